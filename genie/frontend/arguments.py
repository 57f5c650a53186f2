"""From an op's Python arguments to its pattern, literals and floats (the slow path of recording)."""

from __future__ import annotations

from typing import Any

import torch

from genie.errors import UnsupportedOpError

_FORMAT_NAMES = {
    torch.contiguous_format: "contiguous_format",
    torch.preserve_format: "preserve_format",
    torch.channels_last: "channels_last",
    torch.channels_last_3d: "channels_last_3d",
}
#: arguments that mean nothing on a remote device
DROPPED_KWARGS = frozenset({"pin_memory", "non_blocking"})


def pattern_of(value: Any, literals: list[int], where: str) -> list:
    """The wire pattern of one argument (see `OpDef`); ints are appended to ``literals``.

    Raises UnsupportedOpError for a value that cannot cross the wire.
    """
    if isinstance(value, torch.Tensor):
        return ["t"]
    if value is None:
        return ["n"]
    if isinstance(value, bool):
        return ["b", value]
    if isinstance(value, int):
        literals.append(value)
        return ["i"]
    if isinstance(value, float):
        return ["f"]
    if isinstance(value, str):
        return ["s", value]
    if isinstance(value, torch.dtype):
        return ["dt", str(value)[6:]]
    if isinstance(value, torch.memory_format):
        return ["mf", _FORMAT_NAMES[value]]
    if isinstance(value, torch.device):
        return ["dev"]
    if isinstance(value, torch.layout):
        if value is not torch.strided:
            raise UnsupportedOpError(f"{where}: layout {value} is not supported: use dense (strided) tensors")
        return ["ly", "strided"]
    if isinstance(value, complex):
        return ["c", value.real, value.imag]
    if isinstance(value, (list, tuple)):
        return _list_pattern(list(value), literals, where)
    if isinstance(value, torch.Generator):
        raise UnsupportedOpError(
            f"{where}: a generator's state cannot be sent to a server: call torch.manual_seed(seed), which "
            "seeds the session's own stream, and leave the generator out"
        )
    raise UnsupportedOpError(
        f"{where}: an argument of type {type(value).__name__} cannot be sent to a server"
    )


def _list_pattern(items: list, literals: list[int], where: str) -> list:
    if any(isinstance(x, torch.Tensor) for x in items):
        if all(isinstance(x, torch.Tensor) for x in items):
            return ["tl", len(items)]
        if all(x is None or isinstance(x, torch.Tensor) for x in items):
            return ["ol", [0 if x is None else 1 for x in items]]
    elif all(isinstance(x, bool) for x in items) and items:
        return ["bl", list(items)]
    elif all(isinstance(x, int) and not isinstance(x, bool) for x in items):
        literals.extend(items)
        return ["il", len(items)]
    elif all(isinstance(x, float) for x in items):
        return ["fl", len(items)]
    raise UnsupportedOpError(
        f"{where}: a list of mixed types {[type(x).__name__ for x in items]} cannot be sent"
    )


def kwargs_pattern(kwargs: dict[str, Any], literals: list[int], where: str) -> dict[str, list]:
    return {k: pattern_of(v, literals, where) for k, v in kwargs.items() if k not in DROPPED_KWARGS}


def map_tensors(value: Any, fn: Any) -> Any:
    """``value`` with every tensor in it (also inside lists) replaced by ``fn(tensor)``."""
    if isinstance(value, torch.Tensor):
        return fn(value)
    if isinstance(value, (list, tuple)):
        return [map_tensors(x, fn) for x in value]
    return value
