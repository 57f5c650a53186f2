"""Op definitions made callable: patterns checked, constants bound, aliasing facts read off the schema."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch

from genie.errors import ProtocolError, UnsupportedOpError
from genie.server.fastcalls import fast_call
from genie.wire.allowed_ops import PSEUDO_OPS
from genie.wire.allowed_ops import check as check_allowed
from genie.wire.messages import OpDef

_KEYWORD = re.compile(r"[A-Za-z_][A-Za-z0-9_]*\Z")


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
    target: Any = None  # the overload itself; ``call`` may be a faster binding of it


def _pseudo_ops(device: torch.device) -> dict[str, Any]:
    """Ops on the random state. A session's own state stands in the device's generator while they run."""

    def generator() -> torch.Generator:
        if device.type == "cuda":
            torch.cuda.init()
            return torch.cuda.default_generators[device.index or 0]
        return torch.default_generator

    def get_rng_state() -> torch.Tensor:
        return generator().get_state().to(device)

    def set_rng_state(state: torch.Tensor) -> None:
        generator().set_state(state.cpu())

    return {
        "genie::manual_seed": lambda seed: generator().manual_seed(seed),
        "genie::get_rng_state": get_rng_state,
        "genie::set_rng_state": set_rng_state,
    }


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
    if op.op in PSEUDO_OPS:
        call, is_random, overload = _pseudo_ops(device)[op.op], True, None
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
        nested, single, written, aliased, is_random, overload,
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
