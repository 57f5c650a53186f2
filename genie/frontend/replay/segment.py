"""A lowered graph that can be called: binds handles and sizes, submits, wraps what comes out."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.autograd.graph import increment_version

from genie.frontend import shadows
from genie.frontend.entries import Entry
from genie.frontend.handle import UNRECORDED, Handle
from genie.frontend.program import Program
from genie.frontend.recorder import check_roots
from genie.frontend.replay.capture import Geometry, Layouts, Output
from genie.frontend.replay.lower import Lowered
from genie.frontend.replay.symbols import evaluator
from genie.frontend.specs import Spec
from genie.frontend.tensor import LazyTensor, wrap, wrap_view
from genie.profiling import spans
from genie.wire.messages import Relayout

if TYPE_CHECKING:
    from genie.frontend.recorder import Recorder


class Segment:
    """Calls take the graph's arguments and return its outputs, as the graph itself would.

    After a call, `relayouts` holds what the server found laid out otherwise than inferred; such a
    segment is right (the server copied) but should be lowered again.
    """

    def __init__(self, lowered: Lowered) -> None:
        self._lowered = lowered
        self.key = (lowered.code, lowered.kept)
        self.relayouts: list[Relayout] = []
        symbols = lowered.symbols
        self._sources = [(argument, dim) for _, argument, dim in symbols]
        names = [symbol for symbol, _, _ in symbols]
        self._literals: list[int] = [int(x) for x in lowered.literals]
        self._evaluate_literals = evaluator(lowered.literals, names)
        self._geometries, self._plan = _planned(lowered.outputs)
        sizes = [n for g in self._geometries for n in g.sizes]
        sizes += [o.number for o in lowered.outputs if o.kind == "size"]
        self._sizes = [int(n) for n in sizes]
        self._evaluate_sizes = evaluator(sizes, names)
        made = [n for geometries in lowered.made for g in geometries for n in g.sizes]
        self._made = [int(n) for n in made]
        self._evaluate_made: Callable[..., list[int]] | None = None
        self._made_symbolic, self._names = made, names
        self._tensors = lowered.tensors
        # Parameters live as long as their modules: a graph that outlives one must not keep its values.
        self._held = [weakref.ref(t) for t in lowered.attributes]
        self._constants = [t for t in lowered.attributes if not isinstance(t, nn.Parameter)]
        self._held_specs = [t._spec for t in lowered.attributes]
        self._held_gids: list[int] = []
        self._held_by: weakref.ref[Recorder] | None = None  # whose numbers these are
        lowered.attributes = []
        self._expected = [
            (i, s) for i, s in zip(lowered.tensors, lowered.expected, strict=True) if s is not None
        ]
        self._views_of_arguments = [-o.root - 1 for o in lowered.outputs if o.kind == "slot" and o.root < 0]
        named = [o.number for o in lowered.outputs if o.kind == "slot"] + [
            o.root for o in lowered.outputs if o.kind == "slot"
        ]
        #: whether a call needs the tensors that the graph holds, and not only their numbers
        self._needs_all = bool(lowered.mutated) or any(-n > len(lowered.tensors) for n in named)
        self._checked: weakref.WeakSet[Recorder] = weakref.WeakSet()
        self._fixed = self._specs(self._sizes)

    @property
    def n_ops(self) -> int:
        return len(self._lowered.entries)

    def holds_constants_of_another_session(self, args: tuple) -> bool:
        """The constants that the graph makes are made where it is lowered: in one session."""
        constants = self._lowered.constants
        return bool(constants) and constants[0]._h.rec is not args[self._tensors[0]]._h.rec

    def fits(self, args: tuple) -> bool:
        """False when an argument has another geometry than the graph was lowered for.

        Dynamo takes the tensors of a module whose dictionaries have not changed for unchanged; assigning
        to ``parameter.data`` changes one all the same.
        """
        for i, expected in self._expected:
            s = args[i]._spec
            # A view that begins elsewhere in its memory fits, too.
            if s is not expected and (
                s.shape != expected.shape or s.stride != expected.stride or s.dtype is not expected.dtype
            ):
                return False
        return self._bind_held(args[self._tensors[0]]._h.rec)

    def _bind_held(self, recorder: Recorder) -> bool:
        """Looks up what the tensors that the graph holds are called now; False if one looks different."""
        if self._held_by is not None and self._held_by() is recorder:
            for held, gid in zip(self._held, self._held_gids, strict=True):
                h = held()._h  # type: ignore[union-attr] # guards see to it that it lives
                if h.gid != gid or h.rec is not recorder:
                    break
            else:
                return True
        tensors = self._held_tensors()
        for t, expected in zip(tensors, self._held_specs, strict=True):
            s = t._spec
            if s is not expected and (
                s.shape != expected.shape or s.stride != expected.stride or s.dtype is not expected.dtype
            ):
                return False
        with recorder.lock:
            self._held_gids = list(map(recorder.gid_of, tensors))
        self._held_by = weakref.ref(recorder)
        return True

    def _held_tensors(self) -> list[LazyTensor]:
        return [held() for held in self._held]  # type: ignore[misc]

    def describe(self, instruction: int) -> str | None:
        """The Python lines that Dynamo traced the instruction from, innermost last."""
        stack = self._lowered.stacks[instruction].strip()
        return stack.replace("\n", "\n    ") or None

    def layouts(self, relayouts: list[Relayout]) -> Layouts:
        """What the server reported, in the form that `lower` takes."""
        names = [entry.op for entry in self._lowered.entries]
        layouts: Layouts = {}
        for r in relayouts:
            order = sorted(range(len(r.stride)), key=lambda d: -r.stride[d])
            occurrence = names[: r.instruction].count(names[r.instruction])
            layouts[names[r.instruction], occurrence, r.output] = tuple(order)
        return layouts

    def _specs(self, sizes: list[int]) -> list[Spec]:
        specs, at = [], 0
        for g in self._geometries:
            n = 2 * len(g.shape) + 1
            specs.append(g.spec(sizes[at : at + n]))
            at += n
        return specs

    def __call__(self, *args: Any) -> tuple:
        if spans.active is None:
            return self._run(args)
        with spans.span("replay", ops=self.n_ops):
            return self._run(args)

    def _run(self, args: tuple) -> tuple:
        lowered = self._lowered
        tensors: list[LazyTensor] = [args[i] for i in self._tensors]
        recorder, n_given = tensors[0]._h.rec, len(tensors)
        with recorder.lock:
            ext: list[int] = []
            for t in tensors:
                h = t._h
                gid = h.gid
                ext.append(gid if h.rec is recorder and gid != UNRECORDED else recorder.gid_of(t))
            ext += self._held_gids
            if self._needs_all:
                tensors += self._held_tensors()
            values = [args[i] if dim < 0 else args[i].shape[dim] for i, dim in self._sources]
            evaluate = self._evaluate_literals
            literals = self._literals if evaluate is None else evaluate(*values)
            written = [tensors[k] for k in lowered.mutated]
            if written:
                check_roots("a compiled graph", written)
                shadows.kill(written)
            if self._views_of_arguments:
                # A write through such an output would not reach the host's copy of the argument.
                shadows.kill([tensors[k] for k in self._views_of_arguments])
            fresh = recorder not in self._checked
            program = Program(
                key=self.key,
                n_ext=len(ext),
                n_slots=lowered.n_slots,
                literals=literals,
                floats=lowered.floats,
                ext=ext,
                base=0,
                inputs=[],
                release=[],
                entries=self._entries(values) if fresh else lowered.entries,
                fresh=list(range(len(lowered.entries))) if fresh else [],
                layouts=lowered.layouts,
                replay=True,
                concrete=lambda: (
                    self._concrete(values, literals),
                    [t._spec for t in tensors[:n_given]] + self._held_specs,
                ),
                sizes=values,
            )
            outcome = recorder.submit(program, self)
            if fresh:
                self._checked.add(recorder)
                self.relayouts = outcome.relayouts
            base = program.base
            out = self._outputs(args, tensors, recorder, base, values)
        if written:
            increment_version(written)
        return out

    def _outputs(
        self, args: tuple, tensors: list[LazyTensor], recorder: Recorder, base: int, values: list[int]
    ) -> tuple:
        evaluate = self._evaluate_sizes
        sizes = self._sizes if evaluate is None else evaluate(*values)
        specs = self._fixed if evaluate is None else self._specs(sizes)
        handles: dict[int, Any] = {}
        roots: dict[int, list[bool]] = {}
        outs: list[Any] = []
        for output, slot, k in self._plan:
            if output is None:  # a value of its own: nearly all are
                outs.append(wrap(specs[k], Handle(recorder, base + slot)))
            elif output.kind == "slot":
                handle = self._handle(output, tensors, recorder, base, handles, roots)
                if output.root < 0:
                    outs.append(wrap_view(specs[k], handle, tensors[-output.root - 1]))
                else:
                    outs.append(wrap(specs[k], handle))
            elif output.kind == "argument":
                outs.append(args[output.number])
            else:
                outs.append(sizes[k] if output.kind == "size" else None)
        return tuple(outs)

    def _handle(
        self,
        output: Output,
        tensors: list[LazyTensor],
        recorder: Recorder,
        base: int,
        handles: dict[int, Any],
        roots: dict[int, list[bool]],
    ) -> Any:
        """Of a value that shares memory with an argument or with another output, or is one of them."""
        slot, root = output.number, output.root
        if slot < 0:
            return tensors[-slot - 1]._h
        handle = handles.get(slot)
        if handle is None:
            handle = handles[slot] = Handle(recorder, base + slot)
            # A view made without autograd: a later write may not reach a pending backward.
            if root < 0:
                argument = tensors[-root - 1]._h
                if argument.root is None:
                    argument.root = [False, True]
                argument.root[1] = True
                handle.root = argument.root
            else:
                handle.root = roots.setdefault(root, [False, True])
        return handle

    def _concrete(self, values: list[int], literals: list[int]) -> list[Entry]:
        """The instructions as this call's sizes make them."""
        if not values:
            return self._lowered.entries
        at, concrete = 0, []
        for entry in self._entries(values):
            n = len(entry.literals)
            concrete.append(entry.with_sizes(tuple(literals[at : at + n]), entry.outs))
            at += n
        return concrete

    def _entries(self, values: list[int]) -> list[Entry]:
        """The instructions with the specs that this call's sizes give, for the server to check."""
        if not values:
            return self._lowered.entries
        if self._evaluate_made is None:
            self._evaluate_made = evaluator(self._made_symbolic, self._names)
        sizes = self._made if self._evaluate_made is None else self._evaluate_made(*values)
        at, concrete = 0, []
        for entry, geometries in zip(self._lowered.entries, self._lowered.made, strict=True):
            specs = []
            for g in geometries:
                n = len(g.sizes)
                specs.append(g.spec(sizes[at : at + n]))
                at += n
            concrete.append(entry.with_specs(specs))
        return concrete


def _planned(outputs: list[Output]) -> tuple[list[Geometry], list[tuple[Output | None, int, int]]]:
    """The different geometries among the outputs, and for each output (itself, its slot, its geometry's
    or size's number); without the output where its value shares no memory with another."""
    geometries: dict[tuple, int] = {}
    distinct: list[Geometry] = []
    roots = Counter(o.root for o in outputs if o.kind == "slot")
    plan: list[tuple[Output | None, int, int]] = []
    for o in outputs:
        k = -1
        if o.geometry is not None:
            # Literals compare by this call's value; what they stand for must be the same.
            key = (o.geometry.dtype, *(getattr(n, "expr", n) for n in o.geometry.sizes))
            k = geometries.setdefault(key, len(distinct))
            if k == len(distinct):
                distinct.append(o.geometry)
        alone = o.kind == "slot" and o.number == o.root >= 0 and roots[o.root] == 1
        plan.append((None if alone else o, o.number, k))
    at = sum(2 * len(g.shape) + 1 for g in distinct)
    for i, (output, slot, _) in enumerate(plan):
        if output is not None and output.kind == "size":
            plan[i] = (output, slot, at)
            at += 1
    return distinct, plan
