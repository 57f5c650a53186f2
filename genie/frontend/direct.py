"""A shorter way in for the hottest ops while no gradient is recorded.

An op on a tensor subclass passes PyTorch's autograd, view tracking and Python fallback layers
before ``__torch_dispatch__`` sees it: 4 us for a plain op, 9 us for a view (measured on one slow
core). Kernels on ``AutogradPrivateUse1`` record the op at the first of these layers instead. With
a gradient to record, or a tensor that is not ours, they pass the call on to the ordinary kernels.

A view made here is not linked to its base in autograd, so an in-place write through it does not
bump the base's version counter. `Handle.root` watches for the one case where that matters: a
write after autograd has used the base or a view is refused (`recorder.check_roots`).
"""

from __future__ import annotations

from typing import Any

import torch

from genie.errors import UnsupportedOpError
from genie.frontend.composites import _LIBRARY, overload
from genie.frontend.kernels import fast_kernel
from genie.frontend.recorder import HostOperandError
from genie.frontend.tensor import LazyTensor

_VIEWS = (
    "view", "transpose.int", "permute", "unsqueeze", "select.int", "slice.Tensor", "expand",
    "split.Tensor", "t", "squeeze.dim",
)  # fmt: skip
_FUNCTIONAL = (
    "add.Tensor", "sub.Tensor", "mul.Tensor", "div.Tensor", "addmm", "mm", "bmm", "cat", "gelu", "tanh",
    "relu", "silu", "sigmoid", "pow.Tensor_Scalar", "rsqrt", "neg", "mean.dim", "embedding", "argmax",
    "clone", "cos", "sin", "exp",
)  # fmt: skip
_grad_enabled = torch.is_grad_enabled


aten = torch.ops.aten
_Key = torch._C.DispatchKey


def _keys(*keys: Any) -> Any:
    found = torch._C.DispatchKeySet(keys[0])
    for key in keys[1:]:
        found = found.add(key)
    return found


# What autograd passes the call on to. AutogradOther holds PyTorch's own kernels; a
# redispatch does not skip layers that an op falls through, so only views have ADInplaceOrView.
_PLAIN_KEYS = _keys(_Key.AutogradOther, _Key.PythonTLSSnapshot, _Key.Python, _Key.PrivateUse1)
_VIEW_KEYS = _PLAIN_KEYS.add(_Key.ADInplaceOrView)
#: PyTorch hands Python numbers to these ops as marked tensors; from here only their Scalar forms do
_SCALAR_FORMS = {
    aten.add.Tensor: aten.add.Scalar,
    aten.sub.Tensor: aten.sub.Scalar,
    aten.mul.Tensor: aten.mul.Scalar,
    aten.div.Tensor: aten.div.Scalar,
}
_REVERSED_FORMS = {
    aten.add.Tensor: aten.add.Scalar,
    aten.sub.Tensor: aten.rsub.Scalar,
    aten.mul.Tensor: aten.mul.Scalar,
}


def _ordinary(op: Any, args: tuple, kwargs: dict[str, Any], is_view: bool) -> Any:
    """The call as it would be without this module: PyTorch's autograd kernel in the place of ours."""
    if op in _SCALAR_FORMS:
        if not isinstance(args[1], torch.Tensor):
            return _SCALAR_FORMS[op](*args, **kwargs)
        if not isinstance(args[0], torch.Tensor):
            if op not in _REVERSED_FORMS:
                raise UnsupportedOpError(f"{op} of a Python number by a tensor: write number / tensor")
            return _REVERSED_FORMS[op](args[1], args[0], *args[2:], **kwargs)
    return op.redispatch(_VIEW_KEYS if is_view else _PLAIN_KEYS, *args, **kwargs)


def _functional(op: Any) -> Any:
    def kernel(*args: Any, **kwargs: Any) -> Any:
        if not _grad_enabled():
            first = args[0]
            if first.__class__ is list and first:
                first = first[0]
            if first.__class__ is LazyTensor:
                try:
                    return first._h.rec.record(op, args, kwargs)
                except HostOperandError:
                    pass  # the ordinary way lifts CPU tensors
        return _ordinary(op, args, kwargs, False)

    return kernel


def _view(op: Any) -> Any:
    def kernel(*args: Any, **kwargs: Any) -> Any:
        base = args[0]
        if base.__class__ is LazyTensor and not _grad_enabled() and not base.requires_grad:
            h = base._h
            root = h.root
            if root is None:
                h.root = [False, True]
                return h.rec.record(op, args, kwargs)
            if not root[0]:
                root[1] = True
                return h.rec.record(op, args, kwargs)
        return _ordinary(op, args, kwargs, True)

    return kernel


def register() -> None:
    library = torch.library.Library("aten", "IMPL")
    _LIBRARY.append(library)
    for name in _VIEWS:
        op = overload(name)
        library.impl(name, fast_kernel(op, _view(op), is_view=True), "AutogradPrivateUse1")
    for name in _FUNCTIONAL:
        op = overload(name)
        kernel = fast_kernel(op, _functional(op), numbers_for_tensors=op in _SCALAR_FORMS)
        library.impl(name, kernel, "AutogradPrivateUse1")
