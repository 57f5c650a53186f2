"""How the dimensions of a value lie in memory: kept when it moves, and when its parts are joined."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from genie.wire.messages import TensorSpec


def order_of(spec: TensorSpec) -> tuple[int, ...]:
    """The dimensions from the outermost in. Expanded ones are the outermost, so that what can be viewed as
    one dimension can still be so when the value is dense."""
    shape, stride = spec.shape, spec.stride
    return tuple(sorted(range(len(shape)), key=lambda d: (stride[d] != 0 or shape[d] == 1, -stride[d], d)))


def inverse(order: Sequence[int]) -> list[int]:
    """The permutation that undoes ``order``."""
    return sorted(range(len(order)), key=order.__getitem__)


def dense_stride(spec: TensorSpec) -> list[int]:
    """Strides of a dense tensor whose dimensions lie in the order that ``spec`` has them in."""
    shape = spec.shape
    dense, step = [0] * len(shape), 1
    for d in reversed(order_of(spec)):
        dense[d] = step
        step *= max(shape[d], 1)
    return dense


def joined(parts: Sequence[Tensor], dim: int) -> Tensor:
    """`torch.cat`, laid out as the parts are (which need not be contiguous)."""
    first = parts[0]
    order = order_of(TensorSpec("", list(first.shape), list(first.stride()), 0))
    whole = torch.cat([t.permute(order) for t in parts], order.index(dim))
    return whole.permute(inverse(order))


def nbytes(spec: TensorSpec) -> int:
    n: int = getattr(torch, spec.dtype).itemsize
    for size in spec.shape:
        n *= size
    return n
