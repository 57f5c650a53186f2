"""Compiles a template into one generated Python function and runs it on real tensors.

The function is straight-line code, one instruction a line, in program order: views are real views
and mutation is real mutation, so aliasing needs no bookkeeping. A value is dropped after its last
use unless the template keeps it. The same engine runs inside servers and inside a client process
that executes what it captures itself.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Sequence
from keyword import iskeyword
from types import CodeType
from typing import Any

import torch
from torch import Tensor

from genie.errors import ProtocolError
from genie.server.ops import CompiledOp, OpTable, dtype_by_name
from genie.wire.messages import Check, Relayout, TemplateBody, TensorSpec

MAX_INSTRUCTIONS = 20_000
_FILENAME = "<genie template>"


class EngineError(Exception):
    """An instruction of a template raised; ``__cause__`` is the original exception."""

    def __init__(self, instruction: int, op: str, cause: BaseException) -> None:
        self.instruction = instruction
        self.op = op
        super().__init__(f"{op} failed: {cause}")


def program_digest(emitter: _Emitter, ops: OpTable, kept: bytes) -> bytes:
    """SHA-256 of what the program computes, independent of a session's op numbers."""
    h = hashlib.sha256()
    for tid, slots in zip(emitter.tids, emitter.reads, strict=True):
        op = ops[tid]
        h.update(repr((op.name, op.args, op.kwargs, op.outs, slots)).encode())
    h.update(kept)
    return h.digest()


class Template:
    """A compiled program. ``run`` may be called with any literals of the right number."""

    def __init__(self, body: TemplateBody, ops: OpTable) -> None:
        self.n_ext = body.n_ext
        self.kept = _ints(body.kept)
        #: of each kept slot: it is bound to handle ``base`` + this
        self.kept_names = names_of(body)
        emitter = _Emitter(body, ops, self.kept)
        self.n_literals, self.n_floats = emitter.n_literals, emitter.n_floats
        self.n_ops = len(emitter.names)
        self.mutated_ext = frozenset(emitter.mutated_ext)
        self.random = emitter.random
        self._drops = emitter.drops
        self.replay = body.replay
        self.digest = program_digest(emitter, ops, body.kept)
        self.names = emitter.names
        #: of each: its op, the slots it reads, the slots it makes
        self.instructions = emitter.instructions
        self.layouts = emitter.layouts
        self._emitter = emitter
        self._run = emitter.function()
        #: by the places in a request where it runs: what engines know of it (`genie.server.engines.select`)
        self.lanes: dict[int, Any] = {}
        #: the variants that check or time every instruction, made when they are first asked for
        self._variants: dict[tuple[bool, bool], Any] = {}

    def run(
        self,
        ext: list[Tensor],
        literals: Sequence[int],
        floats: Sequence[float],
        checks: list[Check],
        tick: Callable[[], None] | None = None,
        see: Callable[[int, tuple], None] | None = None,
    ) -> tuple[list[Tensor | None], list[Relayout]]:
        """Returns the kept values in order. ``tick`` is called before the first instruction and after each,
        ``see`` with the number and the new values of each that makes any. Raises EngineError naming the
        failing instruction."""
        relayouts: list[Relayout] = []
        try:
            if not checks and tick is None and see is None:
                return self._run(ext, literals, floats), relayouts
            kind = (bool(checks) or see is not None, tick is not None)
            run = self._variants.get(kind)
            if run is None:
                run = self._variants[kind] = self._emitter.function(checked=kind[0], timed=kind[1])
            wanted = {c.instruction: c.specs for c in checks}

            def fix(instruction: int, values: Sequence) -> Sequence:
                specs = wanted.get(instruction)
                if specs is not None:
                    values = [
                        _fix(self.names[instruction], instruction, k, v, s, relayouts)
                        for k, (v, s) in enumerate(zip(values, specs, strict=True))
                    ]
                if see is not None:
                    see(instruction, tuple(values))
                return values

            if tick is not None:
                tick()
            chosen = wanted if see is None else range(self.n_ops)
            return run(ext, literals, floats, chosen, fix, tick), relayouts
        except Exception as exc:
            raise self._engine_error(exc) from exc

    def draws(self, floats: Sequence[float]) -> bool:
        """Whether it uses the random state when it runs with these floats."""
        return self.random and (self._drops is None or any(floats[i] != 0.0 for i in self._drops))

    def part(self, instructions: Sequence[int], slots: Sequence[int]) -> Callable[..., list[Tensor]]:
        """A function of (externals, ints, floats) that runs only those instructions and returns the slots."""
        return self._emitter.function(only=frozenset(instructions), returned=list(slots))

    def _engine_error(self, exc: BaseException) -> EngineError:
        tb, line = exc.__traceback__, 0
        while tb is not None:
            if tb.tb_frame.f_code.co_filename == _FILENAME:
                line = tb.tb_lineno
            tb = tb.tb_next
        # Line 1 is the def, line 2 unpacks the externals; instruction k stands on line k + 3.
        index = min(max(line - 3, 0), len(self.names) - 1)
        return EngineError(index, self.names[index] if self.names else "program", exc)


def _fix(
    name: str, instruction: int, output: int, value: Tensor | None, spec: TensorSpec, out: list[Relayout]
) -> Tensor | None:
    """Makes a prediction true: a layout other than predicted is copied, anything else is an error."""
    if value is None:  # a gradient that was not asked for; meta kernels predict it all the same
        return None
    shape = list(value.shape)
    if shape != spec.shape or value.dtype != dtype_by_name(spec.dtype):
        raise RuntimeError(
            f"{name} made {value.dtype} {shape}, but the client predicted {spec.dtype} {spec.shape}: "
            "please report this op; the session cannot go on"
        )
    stride = value.stride()
    if all(n <= 1 or a == b for n, a, b in zip(shape, stride, spec.stride, strict=True)) or 0 in shape:
        return value
    if value._is_view():
        raise RuntimeError(
            f"{name} made a view with strides {stride}, but the client predicted {spec.stride}"
        )
    out.append(Relayout(instruction, output, list(stride)))
    return torch.empty_strided(shape, spec.stride, dtype=value.dtype, device=value.device).copy_(value)


def _in_order(value: Tensor, order: tuple[int, ...]) -> Tensor:
    """``value``, or a copy of it, dense with its dimensions in ``order`` from the outermost in."""
    shape, stride, step = value.shape, value.stride(), 1
    if len(order) != len(shape):
        raise RuntimeError(f"a value of {len(shape)} dimensions cannot have the layout {order}")
    for d in reversed(order):
        if shape[d] != 1:
            if stride[d] != step:
                break
            step *= shape[d]
    else:
        return value
    inverse = sorted(range(len(order)), key=order.__getitem__)
    return value.permute(order).contiguous().permute(inverse)


def _ints(data: bytes) -> list[int]:
    if len(data) % 4:
        raise ProtocolError("a vector of int32 has a length that is no multiple of 4")
    values = array("i")
    values.frombytes(data)
    return values.tolist()


def names_of(body: TemplateBody) -> list[int]:
    """The names that a template's kept slots are bound to. Raises ProtocolError."""
    kept, names = _ints(body.kept), _ints(body.names)
    if not names:
        return kept
    if len(names) != len(kept) or len(set(names)) != len(names) or min(names) < 0:
        raise ProtocolError(
            f"a template names {len(names)} of its {len(kept)} kept values: "
            "give each a name of its own, from 0 on"
        )
    return names


def _flatten(value: Any) -> list:
    flat: list = []
    for item in value:
        flat.extend(item) if isinstance(item, (list, tuple)) else flat.append(item)
    return flat


class _Emitter:
    """Turns a body into source lines, checking every index on the way."""

    def __init__(self, body: TemplateBody, ops: OpTable, kept: list[int]) -> None:
        self.constants: dict[str, Any] = {"_flatten": _flatten, "_in_order": _in_order}
        self._interned: dict[int, str] = {}
        self.names: list[str] = []
        self.instructions: list[tuple[CompiledOp, list[int], list[int]]] = []
        self.tids: list[int] = []
        self.mutated_ext: set[int] = set()
        self.random = False
        #: floats that must all be 0, or else the program draws random numbers; None: it does anyway
        self.drops: list[int] | None = []
        self._n_ext = body.n_ext
        self._kept = kept
        self._calls: list[str] = []
        self._new: list[list[int]] = []
        self.reads: list[list[int]] = []
        self.n_literals = self.n_floats = 0
        self._slots = 0
        self._root: dict[int, int] = {}
        self.layouts = {slot: tuple(order) for slot, order in body.layouts}
        code, at = _ints(body.code), 0
        if body.n_ext < 0 or body.n_ext > 1_000_000:
            raise ProtocolError(f"a template with {body.n_ext} externals is out of bounds")
        while at < len(code):
            op = ops[code[at]]
            slots = code[at + 1 : at + 1 + op.n_tensors]
            if len(slots) != op.n_tensors or len(self.names) >= MAX_INSTRUCTIONS:
                raise ProtocolError(
                    f"template code is truncated, or has over {MAX_INSTRUCTIONS} instructions"
                )
            self.tids.append(code[at])
            at += 1 + op.n_tensors
            self._instruction(op, slots)
        if (
            self._slots != body.n_slots
            or kept != sorted(set(kept))
            or (kept and not 0 <= kept[0] <= kept[-1] < self._slots)
        ):
            raise ProtocolError("a template's kept slots do not match what its code makes")
        for slot, order in self.layouts.items():
            if not 0 <= slot < self._slots or sorted(order) != list(range(len(order))):
                raise ProtocolError(f"a template's layout {order} of slot {slot} is none")

    def _constant(self, value: Any) -> str:
        name = self._interned.get(id(value))
        if name is None:
            name = self._interned[id(value)] = f"k{len(self.constants)}"
            self.constants[name] = value
        return name

    def _name(self, slot: int) -> str:
        if -self._n_ext <= slot < self._slots:
            return f"v{slot}" if slot >= 0 else f"e{-slot - 1}"
        raise ProtocolError(f"template code uses slot {slot}, which does not exist yet")

    def _expression(self, kind: str, payload: Any, slots: list[str]) -> str:
        """Consumes the argument's tensors from the front of ``slots`` and its literals in order."""
        if kind == "t":
            return slots.pop(0)
        if kind == "i":
            self.n_literals += 1
            return f"L[{self.n_literals - 1}]"
        if kind == "f":
            self.n_floats += 1
            return f"F[{self.n_floats - 1}]"
        if kind == "il":
            self.n_literals += payload
            return f"L[{self.n_literals - payload}:{self.n_literals}]"
        if kind == "fl":
            self.n_floats += payload
            return f"F[{self.n_floats - payload}:{self.n_floats}]"
        if kind == "tl":
            return "[" + ", ".join(slots.pop(0) for _ in range(payload)) + "]"
        if kind == "ol":
            return "[" + ", ".join(slots.pop(0) if present else "None" for present in payload) + "]"
        return "None" if payload is None else self._constant(payload)

    def _instruction(self, op: CompiledOp, slots: list[int]) -> None:
        names = [self._name(s) for s in slots]
        roots = [self._root.get(s, s) for s in slots]
        for k in op.written:
            if roots[k] < 0:
                self.mutated_ext.add(-roots[k] - 1)
        left = list(names)
        parts = [self._expression(k, p, left) for k, p in op.args]
        for key, (kind, payload) in op.kwargs:
            value = self._expression(kind, payload, left)
            parts.append(f"**{{{key!r}: {value}}}" if iskeyword(key) else f"{key}={value}")
        call = f"{self._constant(op.call)}({', '.join(parts)})"
        new, targets = [], []
        for out in op.outs:
            if out == -1:
                if op.aliased >= 0:
                    self._root[self._slots] = roots[op.aliased]
                targets.append(f"v{self._slots}")
                new.append(self._slots)
                self._slots += 1
            else:
                targets.append("_")
        if new:
            if op.single:
                call = f"{targets[0]} = {call}"
            else:
                call = f"{', '.join(targets)}, = " + (f"_flatten({call})" if op.nested else call)
        self._calls.append(call)
        self.names.append(op.name)
        self.instructions.append((op, slots, new))
        self._new.append(new)
        self.reads.append(slots)
        if op.random:
            self.random = True
            self._note_draw(op)

    def _note_draw(self, op: CompiledOp) -> None:
        """An attention draws random numbers only where it drops weights; every other such op does."""
        if op.target is None or all(a.name != "dropout_p" for a in op.target._schema.arguments):
            self.drops = None
            return
        f = self.n_floats - op.n_floats  # the last ones so far are its own
        given = zip((a.name for a in op.target._schema.arguments), op.args, strict=False)
        for name, (kind, payload) in (*given, *op.kwargs):
            if name == "dropout_p":
                if kind != "f" or self.drops is None:
                    self.drops = None
                else:
                    self.drops.append(f)
                return
            f += {"f": 1, "fl": payload}.get(kind, 0)

    def function(
        self,
        *,
        checked: bool = False,
        timed: bool = False,
        only: frozenset[int] | None = None,
        returned: list[int] | None = None,
    ) -> Any:
        """Compiles the lines, or those of ``only`` some. The checked variant hands chosen outputs to ``fix``
        as they are made, the timed one calls ``tick`` after each instruction; both take all three
        of C, fix and tick."""
        result = self._kept if returned is None else returned
        kept, last = set(result), {}
        for i, (reads, new) in enumerate(zip(self.reads, self._new, strict=True)):
            for slot in (*new, *reads):
                last[slot] = i
        dead: list[list[int]] = [[] for _ in self._calls]
        for slot, i in last.items():
            if slot >= 0 and slot not in kept:
                dead[i].append(slot)
        unpack = "".join(f"e{k}, " for k in range(self._n_ext))
        more = ", C, fix, tick" if checked or timed else ""
        lines = [f"def run(E, L, F{more}):", f" {unpack}= E" if unpack else " pass"]
        for i, (call, new) in enumerate(zip(self._calls, self._new, strict=True)):
            if only is not None and i not in only:
                continue
            if checked and new:
                values = "".join(f"v{s}, " for s in new)
                # Still one line per instruction, so that a traceback's line names it.
                call = f"{call}; {values}= fix({i}, ({values})) if {i} in C else ({values})"
            for slot in new:
                if slot in self.layouts:
                    call += f"; v{slot} = _in_order(v{slot}, {self.layouts[slot]})"
            if timed:
                call += "; tick()"
            if dead[i]:
                call += "; " + " = ".join(f"v{s}" for s in dead[i]) + " = None"
            lines.append(" " + call)
        lines.append(" return [" + ", ".join(f"v{s}" for s in result) + "]")
        code: CodeType = compile("\n".join(lines), _FILENAME, "exec")
        scope: dict[str, Any] = dict(self.constants)
        exec(code, scope)  # the source holds nothing but generated names and checked numbers
        return scope["run"]


def compile_template(body: TemplateBody, ops: OpTable, device: torch.device) -> Template:
    """Defines the body's new ops in ``ops`` and compiles it. Raises ProtocolError or UnsupportedOpError."""
    del device  # constants are already bound to the table's device
    for definition in body.defs:
        ops.define(definition)
    return Template(body, ops)
