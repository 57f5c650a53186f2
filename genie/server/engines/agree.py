"""Whether what an engine made is what the eager engine makes of the same call."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from genie.server.engines.kv import State, Value, as_tensor

#: relative L2 error that a change of the order of sums may leave in a kept value
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.complex64: 1e-3, torch.complex128: 1e-6}
TOLERANCE_HALF = 2e-2


def disagreement(made: Sequence[Value | None], eager: Sequence[Value | None]) -> str:
    """In words, which kept value differs, and by how much; "" where none does. Waits for the device."""
    if len(made) != len(eager):
        return f"it keeps {len(made)} values, not {len(eager)}"
    for k, (one, other) in enumerate(zip(made, eager, strict=True)):
        if (one is None) != (other is None):
            return f"kept value {k} is there only once"
        if one is None or other is None:
            continue
        other = as_tensor(other)
        why = _difference(one.view() if isinstance(one, State) else one, other)
        if not why and isinstance(one, Tensor) and one.stride() != other.stride():
            moved = zip(one.shape, one.stride(), other.stride(), strict=True)
            if one.numel() and any(n > 1 and a != b for n, a, b in moved):
                why = f"has strides {one.stride()}, not {other.stride()}"
        if why:
            return f"kept value {k} {why}"
    return ""


def _difference(one: Tensor, other: Tensor) -> str:
    if one.shape != other.shape or one.dtype != other.dtype:
        return f"is {one.dtype} {tuple(one.shape)}, not {other.dtype} {tuple(other.shape)}"
    if not (one.dtype.is_floating_point or one.dtype.is_complex):
        return "" if torch.equal(one, other) else "differs"
    wide = torch.complex128 if one.dtype.is_complex else torch.float64
    a, b = one.to(wide), other.to(wide)
    # Equal infinities, and NaN in the same place, are no difference, and say nothing about the rest.
    finite = torch.isfinite(b)
    same = (a == b) | (torch.isnan(a) & torch.isnan(b))
    if not bool((same | (finite & torch.isfinite(a))).all()):
        return "differs in what is not finite"
    zero = torch.zeros((), dtype=wide, device=a.device)
    error = torch.linalg.vector_norm(torch.where(finite, a - b, zero))
    size = torch.linalg.vector_norm(torch.where(finite, b, zero))
    relative = float(error / size) if size else float(error)
    if relative <= TOLERANCE.get(one.dtype, TOLERANCE_HALF):
        return ""
    return f"differs by {relative:.2g} of its norm"
