"""Hand-written shape rules for ops whose sizes change from token to token.

Inference on device meta costs 0.1 to 1.7 ms per new size, these cost microseconds. A rule may
answer None ("ask meta"); it must never guess. The server checks each prediction once per entry,
except where `is_certain` says that there is nothing to check: such an entry needs no round trip.
"""

from __future__ import annotations

from collections.abc import Sequence
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


def suggests_channels_last(shape: Sequence[int], stride: Sequence[int]) -> bool:
    """What PyTorch's C++ `suggest_memory_format` makes of the strides of four dimensions: ambiguous ones
    (sizes of 1) count as contiguous."""
    if stride[1] == 0:
        return False
    least = 0
    for d in (1, 3, 2, 0):
        if shape[d] == 0 or stride[d] < least or (d == 0 and least == stride[1]):
            return False
        least = stride[d] * shape[d] if shape[d] > 1 else stride[d]
    return True


def channels_last_stride(shape: Sequence[int]) -> tuple[int, int, int, int]:
    """The strides of a dense tensor of four dimensions in channels-last order."""
    _n, c, height, width = shape
    return (height * width * c, 1, width * c, c)


def is_laid_out_channels_last(input: Any, weight: Any) -> bool:
    """Does a convolution (no transposed one) of these geometries lay its output out channels-last?

    cuDNN, oneDNN and PyTorch's own kernels do where its input or its weight is. False where they differ:
    for float64, images of one pixel, and inputs that are neither dense channels-last nor contiguous.
    """
    if input.dtype not in _CHANNELS_LAST_DTYPES or len(input.shape) != 4 or len(weight.shape) != 4:
        return False
    if 0 in input.shape or tuple(input.shape[2:]) == (1, 1):
        return False
    stride = tuple(input.stride)
    if suggests_channels_last(input.shape, stride):
        return stride == channels_last_stride(input.shape)
    return stride == contiguous_stride(tuple(input.shape)) and suggests_channels_last(
        weight.shape, weight.stride
    )


def _conv2d(input: Any, weight: Any, bias: Any = None, stride: Any = 1, padding: Any = 0,
            dilation: Any = 1, groups: int = 1) -> Spec | None:  # fmt: skip
    """Only where meta is wrong: it makes every output contiguous."""
    i, w = input._spec, weight._spec
    if not is_laid_out_channels_last(i, w):
        return None
    if i.dtype is not w.dtype or i.shape[1] != w.shape[1] * groups or w.shape[0] % groups:
        return None  # the op's own error, from meta
    if bias is not None and (bias._spec.shape, bias._spec.dtype) != (w.shape[:1], i.dtype):
        return None
    shape = [i.shape[0], w.shape[0]]
    for d in (0, 1):
        step, pad, spread = (v if v.__class__ is int else v[d % len(v)] for v in (stride, padding, dilation))
        if step < 1 or pad < 0 or spread < 1:
            return None
        shape.append((i.shape[d + 2] + 2 * pad - spread * (w.shape[d + 2] - 1) - 1) // step + 1)
    return spec(tuple(shape), channels_last_stride(shape), 0, i.dtype) if min(shape) > 0 else None


def _convolution(input: Any, weight: Any, bias: Any, stride: Any, padding: Any, dilation: Any,
                 transposed: bool, output_padding: Any, groups: int) -> Spec | None:  # fmt: skip
    return None if transposed else _conv2d(input, weight, bias, stride, padding, dilation, groups)


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


#: whose outputs meta makes contiguous, whatever their inputs are
CONVOLUTIONS = frozenset({aten.conv2d.default, aten.convolution.default})
_CHANNELS_LAST_DTYPES = frozenset({torch.float32, torch.float16, torch.bfloat16})
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
    aten.conv2d.default: _conv2d,
    aten.convolution.default: _convolution,
}
_CERTAIN = frozenset({
    aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.clone.default, aten.slice.Tensor,
    aten.isin.Tensor_Tensor, aten.cat.default,
})  # fmt: skip
