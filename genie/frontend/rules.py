"""Hand-written shape rules for ops whose sizes change from token to token.

Inference on device meta costs 0.1 to 1.7 ms per new size, these cost microseconds. A rule may
answer None ("ask meta"); it must never guess. The server checks each prediction once per entry,
except where `is_certain` says that there is nothing to check: such an entry needs no round trip.
"""

from __future__ import annotations

from typing import Any

import torch

from genie.frontend.specs import Spec, contiguous_stride, spec

aten = torch.ops.aten


def infer(func: torch._ops.OpOverload, args: tuple, kwargs: dict[str, Any]) -> Spec | list[Spec] | None:
    """The spec of the one output, or the specs of a list of outputs; None where meta must be asked."""
    rule = _RULES.get(func)
    return rule(*args, **kwargs) if rule is not None else None


def is_certain(func: torch._ops.OpOverload, args: tuple) -> bool:
    """Is what `infer` answers the same on every device? PyTorch lays these outputs out before it
    chooses a kernel; and attention of one query has one layout, whichever kernel computes it (as long
    as the head's width needs no padding)."""
    if func is aten.scaled_dot_product_attention.default:
        return args[0]._spec.shape[2] == 1 and args[2]._spec.shape[3] % 8 == 0
    return func in _CERTAIN


def _is_contiguous(s: Spec) -> bool:
    """Contiguous, and never taken for channels-last: strides of size-1 dimensions can be ambiguous."""
    if s.stride == contiguous_stride(s.shape):
        return True
    if len(s.shape) in (4, 5) and (s.shape[1] == 1 or s.shape[-1] == 1):
        return False
    return _in_row_order(s)


def _in_row_order(s: Spec) -> bool:
    """What `Tensor.is_contiguous` says: strides of size-1 dimensions do not count."""
    pairs = zip(s.shape, s.stride, contiguous_stride(s.shape), strict=True)
    return s.numel == 0 or all(n == 1 or a == b for n, a, b in pairs)


def _contiguous(shape: tuple[int, ...], dtype: torch.dtype) -> Spec:
    return spec(shape, contiguous_stride(shape), 0, dtype)


def _arithmetic(a: Any, b: Any, **kwargs: Any) -> Spec | None:
    """Two tensors of one shape and dtype, or a tensor and a number of its kind."""
    s = a._spec if hasattr(a, "_spec") else None
    if s is None or s.dtype is torch.bool or not _in_row_order(s):
        return None
    if any(v.__class__ is not int for v in kwargs.values()):
        return None
    if hasattr(b, "_spec"):
        same = b._spec.shape == s.shape and b._spec.dtype is s.dtype and _in_row_order(b._spec)
    elif s.stride != contiguous_stride(s.shape):
        same = False
    else:
        same = b.__class__ is int or (b.__class__ is float and s.dtype.is_floating_point)
    return _contiguous(s.shape, s.dtype) if same else None


def _clone(t: Any, memory_format: Any = None) -> Spec | None:
    s = t._spec
    if memory_format is torch.contiguous_format or s.stride == contiguous_stride(s.shape):
        kept = memory_format in (None, torch.preserve_format, torch.contiguous_format)
        return _contiguous(s.shape, s.dtype) if kept else None
    return None


def _slice(
    t: Any, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> Spec | None:
    s = t._spec
    if not -len(s.shape) <= dim < len(s.shape) or step < 1:
        return None
    dim %= len(s.shape)
    first, last, _ = slice(start, end).indices(s.shape[dim])
    size = max(0, -(-(last - first) // step))
    shape = (*s.shape[:dim], size, *s.shape[dim + 1 :])
    stride = (*s.stride[:dim], s.stride[dim] * step, *s.stride[dim + 1 :])
    return spec(shape, stride, s.offset + first * s.stride[dim], s.dtype)


def _isin(elements: Any, test_elements: Any, **_: Any) -> Spec | None:
    both = isinstance(elements, torch.Tensor) and isinstance(test_elements, torch.Tensor)
    return _contiguous(elements._spec.shape, torch.bool) if both else None


def _cat(tensors: Any, dim: int = 0) -> Spec | None:
    specs = [t._spec for t in tensors]
    first = specs[0]
    rank = len(first.shape)
    if not rank:
        return None
    dim %= rank
    total = 0
    for s in specs:
        if s.dtype is not first.dtype or len(s.shape) != rank or not _is_contiguous(s):
            return None
        if s.shape[:dim] != first.shape[:dim] or s.shape[dim + 1 :] != first.shape[dim + 1 :]:
            return None
        total += s.shape[dim]
    shape = (*first.shape[:dim], total, *first.shape[dim + 1 :])
    return spec(shape, contiguous_stride(shape), 0, first.dtype)


def _attention(query: Any, key: Any, value: Any, attn_mask: Any = None, dropout_p: float = 0.0,
               is_causal: bool = False, **_: Any) -> Spec | None:  # fmt: skip
    q, v = query._spec, value._spec
    if len(q.shape) != 4 or len(v.shape) != 4 or dropout_p != 0.0 or q.dtype is not v.dtype:
        return None
    batch, heads, length, _width = q.shape
    if v.shape[0] != batch:
        return None
    shape = (batch, heads, length, v.shape[3])
    # Fused kernels write (batch, length, heads, width) and hand out its transpose.
    width = shape[3]
    return spec(shape, (length * heads * width, width, heads * width, 1), 0, q.dtype)


def _bin_edges(input: Any, bins: Any, **_: Any) -> list[Spec]:
    """One vector of edges per dimension that is binned; meta has no kernel for it."""
    return [spec((n + 1,), (1,), 0, input._spec.dtype) for n in bins]


def _binned_by_counts(input: Any, bins: Any, **_: Any) -> Spec:
    shape = tuple(bins)
    return spec(shape, contiguous_stride(shape), 0, input._spec.dtype)


def _binned_by_edges(input: Any, bins: Any, **_: Any) -> Spec:
    shape = tuple(t._spec.numel - 1 for t in bins)
    return spec(shape, contiguous_stride(shape), 0, input._spec.dtype)


def differs_between_devices(func: torch._ops.OpOverload, args: tuple, kwargs: dict[str, Any]) -> bool:
    """True when some outputs are shaped otherwise on a CPU than on a GPU: the server must be asked, once."""
    if func in _EMBEDDING_BAGS:
        return True
    position = _SAVES_STATISTICS.get(func)
    if position is None:
        return False
    return not (args[position] if len(args) > position else kwargs["training"])


_EMBEDDING_BAGS = frozenset({aten._embedding_bag.default, aten._embedding_bag_forward_only.default})
#: in evaluation mode a CPU saves no statistics; position of ``training``
_SAVES_STATISTICS = {aten.native_batch_norm.default: 5, aten._native_batch_norm_legit.default: 5}

_RULES: dict[Any, Any] = {
    aten.add.Tensor: _arithmetic,
    aten.sub.Tensor: _arithmetic,
    aten.mul.Tensor: _arithmetic,
    aten.clone.default: _clone,
    aten.slice.Tensor: _slice,
    aten.isin.Tensor_Tensor: _isin,
    aten._histogramdd_bin_edges.default: _bin_edges,
    aten._histogramdd_from_bin_cts.default: _binned_by_counts,
    aten._histogramdd_from_bin_tensors.default: _binned_by_edges,
    aten.cat.default: _cat,
    aten.scaled_dot_product_attention.default: _attention,
}
_CERTAIN = frozenset({
    aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.clone.default, aten.slice.Tensor,
    aten.isin.Tensor_Tensor, aten.cat.default,
})  # fmt: skip
