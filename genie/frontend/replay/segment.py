"""A lowered graph that can be called: binds handles and sizes, submits, wraps what comes out."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch.autograd.graph import increment_version

from genie.frontend import shadows
from genie.frontend.handle import UNRECORDED
from genie.frontend.program import Program
from genie.frontend.recorder import check_roots
from genie.frontend.replay.capture import Layouts, Output
from genie.frontend.replay.lower import Lowered
from genie.frontend.replay.symbols import evaluator
from genie.frontend.specs import Spec
from genie.frontend.tensor import LazyTensor, wrap, wrap_view
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
        sizes = [
            n
            for o in lowered.outputs
            for n in ((o.number,) if o.kind == "size" else o.geometry.sizes if o.geometry is not None else ())
        ]
        self._sizes = [int(n) for n in sizes]
        self._evaluate_sizes = evaluator(sizes, names)
        made = [n for geometries in lowered.made for g in geometries for n in g.sizes]
        self._made = [int(n) for n in made]
        self._evaluate_made: Callable[..., list[int]] | None = None
        self._made_symbolic, self._names = made, names
        self._tensors = lowered.tensors
        self._views_of_arguments = [-o.root - 1 for o in lowered.outputs if o.kind == "slot" and o.root < 0]
        self._checked: weakref.WeakSet[Recorder] = weakref.WeakSet()
        self._fixed: list[Spec | None] = self._specs(self._sizes) if self._evaluate_sizes is None else []

    @property
    def n_ops(self) -> int:
        return len(self._lowered.entries)

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

    def _specs(self, sizes: list[int]) -> list[Spec | None]:
        specs: list[Spec | None] = []
        at = 0
        for o in self._lowered.outputs:
            if o.geometry is not None:
                n = len(o.geometry.sizes)
                specs.append(o.geometry.spec(sizes[at : at + n]))
                at += n
            else:
                specs.append(None)
                at += o.kind == "size"
        return specs

    def __call__(self, *args: Any) -> tuple:
        lowered = self._lowered
        tensors: list[LazyTensor] = [args[i] for i in self._tensors]
        if lowered.constants:
            tensors += lowered.constants
        recorder = tensors[0]._h.rec
        with recorder.lock:
            ext: list[int] = []
            for t in tensors:
                h = t._h
                gid = h.gid
                ext.append(gid if h.rec is recorder and gid != UNRECORDED else recorder.gid_of(t))
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
        if self._evaluate_sizes is None:
            specs, sizes = self._fixed, self._sizes
        else:
            sizes = self._evaluate_sizes(*values)
            specs = self._specs(sizes)
        handles: dict[int, Any] = {}
        roots: dict[int, list[bool]] = {}
        outs: list[Any] = []
        for output, s in zip(self._lowered.outputs, specs, strict=True):
            if s is None:
                outs.append(self._plain(output, args, sizes))
                continue
            slot, root = output.number, output.root
            base_tensor = tensors[-root - 1] if root < 0 else None
            handle = handles.get(slot)
            if handle is None:
                if slot < 0:
                    handle = tensors[-slot - 1]._h
                else:
                    handle = recorder.new_handle(base + slot)
                    if base_tensor is not None:
                        # A view made without autograd: a later write may not reach a pending backward.
                        shared = base_tensor._h.root
                        if shared is None:
                            shared = base_tensor._h.root = [False, True]
                        shared[1] = True
                        handle.root = shared
                    elif slot != root or root in roots:
                        handle.root = roots.setdefault(root, [False, True])
                handles[slot] = handle
            outs.append(wrap(s, handle) if base_tensor is None else wrap_view(s, handle, base_tensor))
        return tuple(outs)

    def _plain(self, output: Output, args: tuple, sizes: list[int]) -> Any:
        if output.kind == "argument":
            return args[output.number]
        if output.kind == "size":
            return self._size_of(output, sizes)
        return None

    def _size_of(self, output: Output, sizes: list[int]) -> int:
        at = 0
        for o in self._lowered.outputs:
            if o is output:
                break
            at += len(o.geometry.sizes) if o.geometry is not None else o.kind == "size"
        return sizes[at]

    def _entries(self, values: list[int]) -> list:
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
