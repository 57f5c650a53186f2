"""Composite ops that are recorded whole, so that the server can use its fused kernels.

Each gets a kernel on ``AutogradPrivateUse1``, which sees the call before PyTorch decomposes it.
When a gradient is needed (or the tensor is not ours) the op is decomposed as usual. No op listed
here ever returns an alias of an input, and none writes to one in the form that is kept whole.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from genie.frontend.kernels import fast_kernel
from genie.frontend.tensor import LazyTensor

aten = torch.ops.aten

NAMES = (
    "linear", "matmul", "scaled_dot_product_attention", "layer_norm", "rms_norm", "group_norm",
    "softmax.int", "log_softmax.int", "conv1d", "conv2d", "conv3d", "conv_transpose1d",
    "conv_transpose2d.input", "conv_transpose3d.input", "batch_norm", "instance_norm",
    "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d", "max_pool1d", "max_pool2d",
    "max_pool3d", "avg_pool1d", "cross_entropy_loss", "nll_loss", "nll_loss_nd", "cosine_similarity",
    "pairwise_distance", "tensordot", "kron", "inner", "outer", "bilinear", "pixel_shuffle", "one_hot",
    "cosine_embedding_loss", "hinge_embedding_loss", "margin_ranking_loss", "triplet_margin_loss",
    "cumulative_trapezoid.x", "trapezoid.x", "cov", "corrcoef", "gradient.scalarint",
    "lstm.input", "gru.input", "rnn_tanh.input", "rnn_relu.input", "lstm_cell", "gru_cell",
)  # fmt: skip
#: running statistics are written to in training mode; position of the flag in the schema
_TRAINING_FLAG = {"batch_norm": 5, "instance_norm": 5, "lstm.input": 6, "gru.input": 6,
                  "rnn_tanh.input": 6, "rnn_relu.input": 6}  # fmt: skip
KEPT: set[Any] = set()
_LIBRARY: list[torch.library.Library] = []


def overload(name: str) -> Any:
    base, _, over = name.partition(".")
    packet = getattr(aten, base, None)
    return getattr(packet, over or "default", None) if packet is not None else None


def tensors_in(values: Any) -> list[torch.Tensor]:
    found = []
    for v in values:
        if isinstance(v, torch.Tensor):
            found.append(v)
        elif isinstance(v, (list, tuple)):
            found.extend(x for x in v if isinstance(x, torch.Tensor))
    return found


_observer = threading.local()


@contextmanager
def observed_by(observer: Any) -> Iterator[None]:
    """While a graph is lowered in this thread, ``observer.composite`` gets the calls on its fake tensors."""
    _observer.current = observer
    try:
        yield
    finally:
        _observer.current = None


def _foreign(op: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """A call that is not for the recorder as it stands: a gradient is needed, or a tensor is not ours."""
    observer = getattr(_observer, "current", None)
    if observer is None or observer.paused:
        return op.decompose(*args, **kwargs)
    return observer.composite(op, args, kwargs)


def _kernel(op: Any, flag: int | None) -> Any:
    def kernel(*args: Any, **kwargs: Any) -> Any:
        if flag is not None and len(args) > flag and args[flag]:
            return op.decompose(*args, **kwargs)
        recorder = None
        grad = torch.is_grad_enabled()
        for a in args:
            if a.__class__ is LazyTensor:
                if grad and a.requires_grad:
                    return op.decompose(*args, **kwargs)
                if recorder is None:
                    recorder = a._h.rec
            elif isinstance(a, torch.Tensor):
                return _foreign(op, args, kwargs)
            elif a.__class__ is list or a.__class__ is tuple:
                for x in tensors_in(a):
                    if x.__class__ is not LazyTensor or (grad and x.requires_grad):
                        return _foreign(op, args, kwargs)
        if kwargs and any(
            x.__class__ is not LazyTensor or (grad and x.requires_grad) for x in tensors_in(kwargs.values())
        ):
            return _foreign(op, args, kwargs)
        if recorder is None:
            return _foreign(op, args, kwargs)
        return recorder.record(op, args, kwargs)

    return kernel


def training(op: Any, args: tuple) -> bool:
    """True when this call would write to running statistics (so it must be decomposed)."""
    flag = _FLAGS.get(op)
    return flag is not None and len(args) > flag and bool(args[flag])


_FLAGS: dict[Any, int] = {}


def register() -> None:
    library = torch.library.Library("aten", "IMPL")
    _LIBRARY.append(library)
    for name in NAMES:
        op = overload(name)
        if op is None or not torch._C._dispatch_has_kernel_for_dispatch_key(
            op.name(), "CompositeImplicitAutograd"
        ):
            continue
        flag = _TRAINING_FLAG.get(name)
        if flag is not None:
            _FLAGS[op] = flag
        kernel = fast_kernel(op, _kernel(op, flag), refuse_flag=flag)
        library.impl(op.name().removeprefix("aten::"), kernel, "AutogradPrivateUse1")
        KEPT.add(op)
