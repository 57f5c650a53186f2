"""Interned tensor geometry. Two tensors of the same geometry share one `Spec` object.

Specs compare by identity, so a spec inside a key can never equal a Python number.
"""

from __future__ import annotations

import torch

from genie.wire.messages import TensorSpec

#: device ``genie`` under the name that it has before it is registered
_DEVICE = torch.device("privateuseone", 0)


class Spec:
    """Shape, stride and storage offset (in elements) and dtype of a strided tensor."""

    __slots__ = ("dtype", "nbytes", "numel", "offset", "shape", "stride", "wrapper")

    def __init__(self, shape: tuple[int, ...], stride: tuple[int, ...], offset: int, dtype: torch.dtype):
        self.shape, self.stride, self.offset, self.dtype = shape, stride, offset, dtype
        numel = 1
        for n in shape:
            numel *= n
        self.numel = numel
        self.nbytes = numel * dtype.itemsize
        #: what `_make_wrapper_subclass` takes, from the size on
        self.wrapper = (shape, stride, offset, None, dtype, torch.strided, _DEVICE)

    def __repr__(self) -> str:
        return f"{str(self.dtype)[6:]}{list(self.shape)}"


_SPECS: dict[tuple, Spec] = {}


def spec(shape: tuple[int, ...], stride: tuple[int, ...], offset: int, dtype: torch.dtype) -> Spec:
    key = (shape, stride, offset, dtype)
    found = _SPECS.get(key)
    if found is None:
        found = _SPECS.setdefault(key, Spec(shape, stride, offset, dtype))
    return found


def spec_of(t: torch.Tensor) -> Spec:
    return spec(tuple(t.shape), t.stride(), int(t.storage_offset()), t.dtype)


def contiguous_stride(shape: tuple[int, ...]) -> tuple[int, ...]:
    stride, step = [], 1
    for n in reversed(shape):
        stride.append(step)
        step *= max(n, 1)
    return tuple(reversed(stride))


def meta_tensor(s: Spec) -> torch.Tensor:
    """A tensor of this geometry on device meta, for shape inference."""
    if s.offset == 0:
        return torch.empty_strided(s.shape, s.stride, dtype=s.dtype, device="meta")
    extent = s.offset + 1 + sum((n - 1) * st for n, st in zip(s.shape, s.stride, strict=True) if n > 0)
    return torch.empty(extent, dtype=s.dtype, device="meta").as_strided(s.shape, s.stride, s.offset)


def to_wire(s: Spec) -> TensorSpec:
    return TensorSpec(str(s.dtype)[6:], list(s.shape), list(s.stride), s.offset)
