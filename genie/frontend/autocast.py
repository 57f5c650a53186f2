"""`torch.autocast("genie")`: the casts that PyTorch makes on its own accelerators.

The lists are those of ``ATen/autocast_mode.h``; a test compares them with the kernels that the
installed PyTorch registers for CUDA. Each op gets a kernel on ``AutocastPrivateUse1``, a key that
calls pass only inside ``autocast``. float64 tensors and tensors of other devices are left alone.

Unlike PyTorch's C++ kernels these keep no cache of cast weights: a weight used twice in one
forward is cast twice, so its gradients add up in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from genie.frontend import composites

_LOWER_PRECISION = (
    "_convolution.deprecated", "_convolution", "conv1d", "conv2d", "conv3d", "conv_tbc", "conv_transpose1d",
    "conv_transpose2d.input", "conv_transpose3d.input", "convolution", "prelu", "addmm", "addmv", "addr",
    "matmul", "einsum", "mm", "mv", "linalg_vecdot", "linear", "addbmm", "baddbmm", "bmm", "chain_matmul",
    "linalg_multi_dot", "_thnn_fused_lstm_cell", "_thnn_fused_gru_cell", "lstm_cell", "gru_cell",
    "rnn_tanh_cell", "rnn_relu_cell", "_scaled_dot_product_flash_attention", "scaled_dot_product_attention",
)  # fmt: skip
_FLOAT32 = (
    "acos", "asin", "cosh", "erfinv", "exp", "expm1", "log", "log10", "log2", "log1p", "reciprocal", "rsqrt",
    "sinh", "tan", "pow.Tensor_Scalar", "pow.Tensor_Tensor", "pow.Scalar", "softplus", "layer_norm",
    "native_layer_norm", "rms_norm", "group_norm", "frobenius_norm.dim", "nuclear_norm", "nuclear_norm.dim",
    "cosine_similarity", "poisson_nll_loss", "cosine_embedding_loss", "nll_loss", "nll_loss2d",
    "hinge_embedding_loss", "kl_div", "l1_loss", "smooth_l1_loss", "huber_loss", "mse_loss",
    "margin_ranking_loss", "multilabel_margin_loss", "soft_margin_loss", "triplet_margin_loss",
    "multi_margin_loss", "binary_cross_entropy_with_logits", "dist", "pdist", "cdist", "renorm", "logsumexp",
    "upsample_nearest1d", "_upsample_nearest_exact1d", "upsample_nearest2d", "_upsample_nearest_exact2d",
    "upsample_nearest3d", "_upsample_nearest_exact3d", "upsample_linear1d", "upsample_bilinear2d",
    "_upsample_bilinear2d_aa", "upsample_trilinear3d", "upsample_bicubic2d", "_upsample_bicubic2d_aa",
)  # fmt: skip
#: ops that compute in float32 by their own dtype argument, unless the caller gave one
_FLOAT32_BY_DTYPE = (
    "prod", "prod.dim_int", "softmax.int", "log_softmax.int", "cumprod", "cumsum", "linalg_vector_norm",
    "linalg_matrix_norm", "linalg_matrix_norm.str_ord", "sum", "sum.dim_IntList",
)  # fmt: skip
#: ops replaced by an overload that takes a dtype
_FLOAT32_BY_OVERLOAD = {
    "norm.Scalar": "norm.ScalarOpt_dtype",
    "norm.ScalarOpt_dim": "norm.ScalarOpt_dim_dtype",
}
#: ops whose tensors must agree: they meet in the widest dtype among them
_WIDEST = (
    "addcdiv", "addcmul", "atan2", "bilinear", "cross", "dot", "vdot", "grid_sampler", "index_put",
    "tensordot", "scatter_add",
)  # fmt: skip
_UNSAFE = ("binary_cross_entropy",)

_NO_AUTOCAST = torch._C.DispatchKeySet(
    torch._C.DispatchKey.AutocastPrivateUse1  # type: ignore[attr-defined]
)
_LIBRARY: list[torch.library.Library] = []


def _eligible(value: Any) -> bool:
    return (
        isinstance(value, torch.Tensor)
        and value.device.type == "genie"
        and value.is_floating_point()
        and value.dtype is not torch.float64
    )


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, (list, tuple)):
        return [_cast(x, dtype) for x in value]
    return value.to(dtype) if _eligible(value) and value.dtype is not dtype else value


def _call(op: Any, args: tuple, kwargs: dict[str, Any], dtype: torch.dtype) -> Any:
    return op(*(_cast(a, dtype) for a in args), **{k: _cast(v, dtype) for k, v in kwargs.items()})


def _lower_precision(op: Any) -> Callable:
    def kernel(*args: Any, **kwargs: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(_NO_AUTOCAST):
            return _call(op, args, kwargs, torch.get_autocast_dtype("genie"))

    return kernel


def _float32(op: Any) -> Callable:
    def kernel(*args: Any, **kwargs: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(_NO_AUTOCAST):
            return _call(op, args, kwargs, torch.float32)

    return kernel


def _float32_by_dtype(op: Any) -> Callable:
    position = [a.name for a in op._schema.arguments].index("dtype")

    def kernel(*args: Any, **kwargs: Any) -> Any:
        given = args[position] if len(args) > position else kwargs.get("dtype")
        with torch._C._ExcludeDispatchKeyGuard(_NO_AUTOCAST):
            if given is None and _eligible(args[0]):
                return op(*args[:position], **(kwargs | {"dtype": torch.float32}))
            return op(*args, **kwargs)

    return kernel


def _float32_by_overload(op: Any, with_dtype: Any) -> Callable:
    names = [a.name for a in op._schema.arguments]
    defaults = {a.name: a.default_value for a in op._schema.arguments if a.has_default_value()}

    def kernel(*args: Any, **kwargs: Any) -> Any:
        bound = defaults | dict(zip(names, args, strict=False)) | kwargs
        dtype = torch.float32 if _eligible(args[0]) else args[0].dtype
        with torch._C._ExcludeDispatchKeyGuard(_NO_AUTOCAST):
            return with_dtype(*(bound[n] for n in names), dtype=dtype)

    return kernel


def _widest(op: Any) -> Callable:
    def kernel(*args: Any, **kwargs: Any) -> Any:
        lower = torch.get_autocast_dtype("genie")
        dtypes = {t.dtype for t in composites.tensors_in((*args, *kwargs.values())) if _eligible(t)}
        if not dtypes <= {lower, torch.float32}:
            raise RuntimeError(
                f"{op.name()} under autocast to {lower} got tensors of {sorted(map(str, dtypes))}: "
                f"give it float32 or {lower} tensors"
            )
        with torch._C._ExcludeDispatchKeyGuard(_NO_AUTOCAST):
            return _call(op, args, kwargs, torch.float32 if torch.float32 in dtypes else lower)

    return kernel


def _unsafe(op: Any) -> Callable:
    def kernel(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError(
            f"{op.name()} is unsafe to autocast: use binary_cross_entropy_with_logits (BCEWithLogitsLoss) "
            "instead of a sigmoid and binary_cross_entropy (BCELoss)"
        )

    return kernel


def _by_parts(op: Any) -> Callable:
    def kernel(*args: Any, **kwargs: Any) -> Any:
        return op.decompose(*args, **kwargs)

    return kernel


def policies() -> dict[str, Callable]:
    """The autocast kernel of each op that has one, by name, for the installed PyTorch."""
    kernels: dict[str, Callable] = {}
    for names, make in (
        (_LOWER_PRECISION, _lower_precision),
        (_FLOAT32, _float32),
        (_FLOAT32_BY_DTYPE, _float32_by_dtype),
        (_WIDEST, _widest),
        (_UNSAFE, _unsafe),
    ):
        for name in names:
            op = composites.overload(name)
            # The lists differ between versions of PyTorch: 2.11 does not cast `rms_norm`.
            if op is not None and _is_cast_on_cuda(name):
                kernels[name] = make(op)
    for name, target in _FLOAT32_BY_OVERLOAD.items():
        kernels[name] = _float32_by_overload(composites.overload(name), composites.overload(target))
    return kernels


def _is_cast_on_cuda(name: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{name}", "AutocastCUDA")


def register() -> None:
    """To be called after `composites.register`: what it keeps whole and no list names is taken apart,
    so that the ops inside are cast."""
    library = torch.library.Library("aten", "IMPL")
    kernels = policies()
    for op in composites.KEPT:
        kernels.setdefault(op.name().removeprefix("aten::"), _by_parts(op))
    for name, kernel in kernels.items():
        library.impl(name, kernel, "AutocastPrivateUse1")
    others = torch.library.Library("_", "IMPL")
    others.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    _LIBRARY.extend((library, others))
