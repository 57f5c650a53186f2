"""Compiles a template into one generated Python function and runs it on real tensors.

The function is straight-line code, one instruction a line, in program order: views are real views
and mutation is real mutation, so aliasing needs no bookkeeping. A value is dropped after its last
use unless the template keeps it. The same engine runs inside servers and inside a client process
that executes what it captures itself.
"""

from __future__ import annotations

import hashlib
import re
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from types import CodeType
from typing import Any

import torch
from torch import Tensor

from genie.errors import ProtocolError, UnsupportedOpError
from genie.server.fastcalls import fast_call
from genie.wire.allowed_ops import check as check_allowed
from genie.wire.messages import Check, OpDef, Relayout, TemplateBody, TensorSpec

MAX_INSTRUCTIONS = 20_000
_FILENAME = "<genie template>"
_KEYWORD = re.compile(r"[a-z_][a-z0-9_]*\Z")


class EngineError(Exception):
    """An instruction of a template raised; ``__cause__`` is the original exception."""

    def __init__(self, instruction: int, op: str, cause: BaseException) -> None:
        self.instruction = instruction
        self.op = op
        super().__init__(f"{op} failed: {cause}")


@dataclass(frozen=True)
class CompiledOp:
    """An op definition made callable. ``args`` are code fragments with {t}, {i} and {f} holes."""

    name: str
    call: Any
    args: tuple[tuple[str, Any], ...]  # (kind, payload), positional first
    kwargs: tuple[tuple[str, tuple[str, Any]], ...]
    n_tensors: int
    n_ints: int
    n_floats: int
    outs: tuple[int, ...]
    nested: bool  # the op returns lists inside a tuple
    single: bool  # the op returns one bare tensor
    written: tuple[int, ...]  # tensor arguments that the op writes to
    aliased: int  # tensor argument that the outputs are views of, or -1
    random: bool


def _manual_seed(device: torch.device) -> Any:
    def seed(value: int) -> None:
        if device.type == "cuda":
            torch.cuda.manual_seed(value)
        else:
            torch.default_generator.manual_seed(value)

    return seed


class OpTable:
    """The op definitions of one session: small ints to callables."""

    MAX_DEFS = 65_536

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._ops: dict[int, CompiledOp] = {}

    def __getitem__(self, tid: int) -> CompiledOp:
        try:
            return self._ops[tid]
        except KeyError:
            raise ProtocolError(f"template uses op number {tid}, which was never defined") from None

    def define(self, op: OpDef) -> None:
        """Raises UnsupportedOpError for an op that is not allowed, ProtocolError for a bad pattern."""
        if op.tid in self._ops or len(self._ops) >= self.MAX_DEFS:
            raise ProtocolError(
                f"op number {op.tid} is defined twice, or over {self.MAX_DEFS} ops are defined"
            )
        self._ops[op.tid] = compile_op(op, self._device)


def resolve(name: str) -> torch._ops.OpOverload:
    """The overload called ``aten::name.overload``. Raises UnsupportedOpError when torch lacks it."""
    namespace, _, rest = name.partition("::")
    base, _, overload = rest.partition(".")
    try:
        return getattr(getattr(getattr(torch.ops, namespace), base), overload or "default")
    except (AttributeError, RuntimeError):
        raise UnsupportedOpError(
            f"the server's torch {torch.__version__} has no op {name}: use the client's torch version there"
        ) from None


def compile_op(op: OpDef, device: torch.device) -> CompiledOp:
    check_allowed(op.op)
    counts = {"t": 0, "i": 0, "f": 0}
    args = tuple(_pattern(p, counts, device) for p in op.args)
    for key in op.kwargs:
        if not _KEYWORD.match(key):
            raise ProtocolError(f"{op.op}: {key!r} is no argument name")
    kwargs = tuple((k, _pattern(p, counts, device)) for k, p in op.kwargs.items())
    written: tuple[int, ...] = ()
    aliased = -1
    nested, single, is_random = False, True, False
    if op.op == "genie::manual_seed":
        call = _manual_seed(device)
    else:
        overload = resolve(op.op)
        schema = overload._schema
        call = fast_call(op.op, overload)
        written, aliased = _alias_facts(schema, op)
        returns = [str(r.type) for r in schema.returns]
        single = len(returns) == 1 and returns[0] in ("Tensor", "Tensor?")
        nested = len(returns) > 1 and any("[]" in r for r in returns)
        is_random = torch.Tag.nondeterministic_seeded in overload.tags
    if any(out >= counts["t"] or out < -2 for out in op.outs):
        raise ProtocolError(f"{op.op}: output pattern {op.outs} names an argument that it does not have")
    return CompiledOp(
        op.op, call, args, kwargs, counts["t"], counts["i"], counts["f"], tuple(op.outs),
        nested, single, written, aliased, is_random,
    )  # fmt: skip


def _alias_facts(schema: Any, op: OpDef) -> tuple[tuple[int, ...], int]:
    """Which tensor arguments are written to, and which one the outputs are views of."""
    position = 0
    written: list[int] = []
    viewed = -1
    patterns = list(op.args)
    names = [a.name for a in schema.arguments]
    bound = dict(zip(names, patterns, strict=False)) | op.kwargs
    if len(patterns) > len(names) or not set(op.kwargs) <= set(names):
        raise ProtocolError(f"{op.op} does not take these arguments: its schema is {schema}")
    for argument in schema.arguments:
        pattern = bound.get(argument.name)
        if pattern is None:
            continue
        width = _width(pattern)
        info = argument.alias_info
        if width and info is not None:
            if info.is_write:
                written.extend(range(position, position + width))
            elif viewed < 0:
                viewed = position
        elif argument.name in ("running_mean", "running_var") and _training(bound):
            # Normalisation ops write to their running statistics; their schemas do not say so.
            written.extend(range(position, position + width))
        position += width
    returns_view = any(
        (r.alias_info is not None and not r.alias_info.is_write) or ("[]" in str(r.type) and viewed >= 0)
        for r in schema.returns
    )
    return tuple(written), viewed if returns_view else -1


def _training(bound: dict[str, list]) -> bool:
    flags = [bound[n] for n in ("training", "train", "use_input_stats") if n in bound]
    return not flags or flags[0] != ["b", False]


def _width(pattern: list) -> int:
    if pattern[0] == "t":
        return 1
    if pattern[0] == "tl":
        return int(pattern[1])
    return sum(pattern[1]) if pattern[0] == "ol" else 0


_DTYPES = {str(d)[6:]: d for d in vars(torch).values() if isinstance(d, torch.dtype)}
_FORMATS = {
    "contiguous_format": torch.contiguous_format,
    "preserve_format": torch.preserve_format,
    "channels_last": torch.channels_last,
    "channels_last_3d": torch.channels_last_3d,
}


def dtype_by_name(name: str) -> torch.dtype:
    try:
        return _DTYPES[name]
    except KeyError:
        raise ProtocolError(f"{name!r} is no torch dtype") from None


def _pattern(pattern: Any, counts: dict[str, int], device: torch.device) -> tuple[str, Any]:
    """Checks one argument pattern; constants become ("const", object)."""
    if not isinstance(pattern, list) or not pattern or not isinstance(pattern[0], str):
        raise ProtocolError(f"bad argument pattern {pattern!r}")
    kind, rest = pattern[0], pattern[1:]
    if kind in ("t", "i", "f") and not rest:
        counts[kind] += 1
        return kind, None
    if kind in ("n", "dev", "ly") and len(rest) <= 1:
        if kind == "ly" and rest != ["strided"]:
            raise UnsupportedOpError(f"layout {rest} is not supported: use dense (strided) tensors")
        return "const", {"n": None, "dev": device, "ly": torch.strided}[kind]
    if len(rest) == 1:
        value = rest[0]
        if kind in ("tl", "il", "fl") and type(value) is int and 0 <= value <= 4096:
            counts[kind[0]] += value
            return kind, value
        if kind == "ol" and isinstance(value, list) and all(x in (0, 1) for x in value):
            counts["t"] += sum(value)
            return kind, tuple(value)
        if (kind == "b" and type(value) is bool) or (kind == "s" and isinstance(value, str)):
            return "const", value
        if kind == "bl" and isinstance(value, list) and all(type(x) is bool for x in value):
            return "const", value
        if kind == "dt" and isinstance(value, str):
            return "const", dtype_by_name(value)
        if kind == "mf" and value in _FORMATS:
            return "const", _FORMATS[value]
    if kind == "c" and len(rest) == 2 and all(isinstance(x, (int, float)) for x in rest):
        return "const", complex(*rest)
    raise ProtocolError(f"bad argument pattern {pattern!r}")


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
        emitter = _Emitter(body, ops, self.kept)
        self.n_literals, self.n_floats = emitter.n_literals, emitter.n_floats
        self.n_ops = len(emitter.names)
        self.mutated_ext = frozenset(emitter.mutated_ext)
        self.random = emitter.random
        self.digest = program_digest(emitter, ops, body.kept)
        self._names = emitter.names
        self._emitter: _Emitter | None = emitter
        self._constants = emitter.constants
        self._run = emitter.function(checked=False)
        self._run_checked: Any = None

    def run(
        self, ext: list[Tensor], literals: Sequence[int], floats: Sequence[float], checks: list[Check]
    ) -> tuple[list[Tensor | None], list[Relayout]]:
        """Returns the kept values in order. Raises EngineError naming the failing instruction."""
        relayouts: list[Relayout] = []
        try:
            if not checks:
                return self._run(ext, literals, floats), relayouts
            if self._run_checked is None:
                assert self._emitter is not None
                self._run_checked = self._emitter.function(checked=True)
            wanted = {c.instruction: c.specs for c in checks}

            def fix(instruction: int, values: tuple) -> list:
                return [
                    _fix(self._names[instruction], instruction, k, v, s, relayouts)
                    for k, (v, s) in enumerate(zip(values, wanted[instruction], strict=True))
                ]

            return self._run_checked(ext, literals, floats, wanted, fix), relayouts
        except Exception as exc:
            raise self._engine_error(exc) from exc

    def _engine_error(self, exc: BaseException) -> EngineError:
        tb, line = exc.__traceback__, 0
        while tb is not None:
            if tb.tb_frame.f_code.co_filename == _FILENAME:
                line = tb.tb_lineno
            tb = tb.tb_next
        # Line 1 is the def, line 2 unpacks the externals; instruction k stands on line k + 3.
        index = min(max(line - 3, 0), len(self._names) - 1)
        return EngineError(index, self._names[index] if self._names else "program", exc)


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


def _ints(data: bytes) -> list[int]:
    if len(data) % 4:
        raise ProtocolError("a vector of int32 has a length that is no multiple of 4")
    values = array("i")
    values.frombytes(data)
    return values.tolist()


def _flatten(value: Any) -> list:
    flat: list = []
    for item in value:
        flat.extend(item) if isinstance(item, (list, tuple)) else flat.append(item)
    return flat


class _Emitter:
    """Turns a body into source lines, checking every index on the way."""

    def __init__(self, body: TemplateBody, ops: OpTable, kept: list[int]) -> None:
        self.constants: dict[str, Any] = {"_flatten": _flatten}
        self._interned: dict[int, str] = {}
        self.names: list[str] = []
        self.tids: list[int] = []
        self.mutated_ext: set[int] = set()
        self.random = False
        self._n_ext = body.n_ext
        self._kept = kept
        self._calls: list[str] = []
        self._new: list[list[int]] = []
        self.reads: list[list[int]] = []
        self.n_literals = self.n_floats = 0
        self._slots = 0
        self._root: dict[int, int] = {}
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
        parts += [f"{key}={self._expression(k, p, left)}" for key, (k, p) in op.kwargs]
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
        self._new.append(new)
        self.reads.append(slots)
        self.random = self.random or op.random or op.name == "genie::manual_seed"

    def function(self, *, checked: bool) -> Any:
        """Compiles the lines; the checked variant hands chosen outputs to ``fix`` as they are made."""
        kept, last = set(self._kept), {}
        for i, (reads, new) in enumerate(zip(self.reads, self._new, strict=True)):
            for slot in (*new, *reads):
                last[slot] = i
        dead: list[list[int]] = [[] for _ in self._calls]
        for slot, i in last.items():
            if slot >= 0 and slot not in kept:
                dead[i].append(slot)
        unpack = "".join(f"e{k}, " for k in range(self._n_ext))
        lines = [f"def run(E, L, F{', C, fix' if checked else ''}):", f" {unpack}= E" if unpack else " pass"]
        for i, (call, new) in enumerate(zip(self._calls, self._new, strict=True)):
            if checked and new:
                values = "".join(f"v{s}, " for s in new)
                # Still one line per instruction, so that a traceback's line names it.
                call = f"{call}; {values}= fix({i}, ({values})) if {i} in C else ({values})"
            if dead[i]:
                call += "; " + " = ".join(f"v{s}" for s in dead[i]) + " = None"
            lines.append(" " + call)
        lines.append(" return [" + ", ".join(f"v{s}" for s in self._kept) + "]")
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
