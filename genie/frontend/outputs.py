"""``out=`` arguments that cannot be written where they are.

Most ops write to their ``out`` on the server as they would anywhere. Three cases are told apart
here, and run as "the functional form, then its result into ``out``": an ``out`` of zero elements,
which PyTorch grows; results whose shape only the server knows; and composite ops, because PyTorch's
own decompositions of ``op(..., out=)`` assign to a local variable in place of ``out`` when they meet
a tensor subclass (`linalg.matrix_rank` returned uninitialised memory that way).
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from genie.errors import UnsupportedOpError
from genie.frontend.tensor import LazyTensor

aten = torch.ops.aten
_FACTORY_ARGUMENTS = frozenset({"dtype", "layout", "device", "pin_memory"})


class NeedsFunctionalForm(Exception):
    """The op cannot write to its ``out`` as it is: run its functional form (`functional_then_write`)."""


def out_names(op: torch._ops.OpOverload) -> list[str]:
    """The names of the arguments that results are written to, in the order of the results."""
    return [a.name for a in op._schema.arguments if a.is_out]


@cache
def functional_form(op: torch._ops.OpOverload) -> torch._ops.OpOverload | None:
    """The overload that returns what ``op`` writes to its ``out``; None where there is none."""
    schema = op._schema
    wanted = [(a.name, str(a.type)) for a in schema.arguments if not a.is_out]
    if not out_names(op) or not schema.returns:
        return None
    for name in op.overloadpacket.overloads():
        other = getattr(op.overloadpacket, name)
        arguments = other._schema.arguments
        if any(a.is_out for a in arguments):
            continue
        given = [(a.name, str(a.type)) for a in arguments]
        extra = {n for n, _ in given[len(wanted) :]}
        if given[: len(wanted)] == wanted and extra <= _FACTORY_ARGUMENTS:
            return other
    return None


def functional_then_write(op: torch._ops.OpOverload, args: tuple, kwargs: dict[str, Any]) -> Any:
    """``op(..., out=)`` by its functional form. Returns the out tensors, like the op itself."""
    functional = functional_form(op)
    if functional is None:
        raise UnsupportedOpError(
            f"{op} would resize its out=, or makes results whose shape depends on values, and has no form "
            "without out=: give it tensors of the final shape"
        )
    names = out_names(op)
    bound = dict(zip((a.name for a in op._schema.arguments), args, strict=False)) | kwargs
    outs = [bound.pop(n) for n in names]
    extra = {a.name for a in functional._schema.arguments} & _FACTORY_ARGUMENTS - bound.keys()
    if "dtype" in extra:
        bound["dtype"] = outs[0].dtype
    if "device" in extra:
        bound["device"] = torch.device("genie")
    if torch.is_grad_enabled() and any(_requires_grad(v) for v in (*bound.values(), *outs)):
        raise RuntimeError(
            f"{op.overloadpacket}(): functions with out=... arguments don't support automatic "
            "differentiation, but one of the arguments requires grad."
        )
    with torch.no_grad():
        # Positional where the schema allows it: kernels expect their tensors there.
        positional = [a.name for a in functional._schema.arguments if not a.kwarg_only and a.name in bound]
        results = functional(*[bound.pop(n) for n in positional], **bound)
    results = (results,) if isinstance(results, torch.Tensor) else results
    for out, value in zip(outs, results, strict=True):
        write(out, value, str(op))
    return outs[0] if len(outs) == 1 else tuple(outs)


def _requires_grad(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return any(map(_requires_grad, value))
    return isinstance(value, torch.Tensor) and value.requires_grad


def write(out: torch.Tensor, value: torch.Tensor, where: str) -> None:
    """``value`` into ``out``, which takes on its shape if it has no elements.

    Raises RuntimeError for an ``out`` on another device and where PyTorch would not cast,
    UnsupportedOpError for another shape.
    """
    if not isinstance(out, LazyTensor):
        raise RuntimeError(f"{where}: expected out= on device 'genie:0', but it is on '{out.device}'")
    if out is value:
        return
    if not torch.can_cast(value.dtype, out.dtype):
        raise RuntimeError(
            f"result type {_name(value.dtype)} can't be cast to the desired output type {_name(out.dtype)}"
        )
    if out.shape != value.shape:
        resize(out, tuple(value.shape), value.stride(), where)
    out.copy_(value)


def _name(dtype: torch.dtype) -> str:
    return {torch.float32: "Float", torch.float64: "Double", torch.int64: "Long", torch.bool: "Bool"}.get(
        dtype, str(dtype)[6:].capitalize()
    )


def resize(t: torch.Tensor, shape: tuple[int, ...], stride: tuple[int, ...], where: str) -> None:
    """Gives ``t``, which must not have elements, uninitialised ones. Raises UnsupportedOpError else."""
    if t.numel():
        raise UnsupportedOpError(
            f"{where} would resize a tensor of shape {list(t.shape)} to {list(shape)}: its storage is on a "
            "server and cannot grow; give it a tensor of the final shape, or one without elements"
        )
    assert isinstance(t, LazyTensor)
    become(t, torch.empty_strided(shape, stride, dtype=t.dtype, device="genie"))


def become(t: LazyTensor, other: torch.Tensor) -> None:
    """``t`` is from now on the value and the geometry that ``other`` is."""
    assert isinstance(other, LazyTensor)
    torch.Tensor.data.__set__(t, other)  # type: ignore[attr-defined]
    t._h, t._spec = other._h, other._spec


def resize_in_place(func: Any, args: tuple, kwargs: dict[str, Any]) -> torch.Tensor:
    """``resize_`` and ``resize_as_``: down to fewer elements of the same storage, or up from none."""
    t = args[0]
    target = args[1]
    shape = tuple(target.shape) if isinstance(target, torch.Tensor) else tuple(int(n) for n in target)
    layout = kwargs.get("memory_format")
    if layout is torch.preserve_format:
        if not isinstance(target, torch.Tensor):
            raise RuntimeError("resize_ does not take torch.preserve_format: name a format")
        stride = target.stride()
    else:
        stride = torch.empty(shape, memory_format=layout or torch.contiguous_format, device="meta").stride()
    if shape == tuple(t.shape) and layout is None:
        return t
    numel = 1
    for n in shape:
        numel *= n
    if numel and numel <= t.numel() and t.is_contiguous():
        become(t, aten.as_strided.default(t, shape, stride, int(t.storage_offset())))
    elif numel == 0:
        become(t, torch.empty_strided(shape, stride, dtype=t.dtype, device="genie"))
    else:
        resize(t, shape, stride, str(func))
    return t


def _composite_kernel(op: torch._ops.OpOverload) -> Any:
    def kernel(*args: Any, **kwargs: Any) -> Any:
        return functional_then_write(op, args, kwargs)

    return kernel


def composite_handler(func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    return functional_then_write(func, args, kwargs)


def is_composite_out(op: torch._ops.OpOverload) -> bool:
    """A composite ``out=`` overload that has a functional form."""
    return (
        bool(out_names(op))
        and torch._C._dispatch_has_kernel_for_dispatch_key(op.name(), "CompositeImplicitAutograd")
        and functional_form(op) is not None
    )


def register(library: torch.library.Library) -> None:
    for name in torch._C._dispatch_get_registrations_for_dispatch_key("CompositeImplicitAutograd"):
        namespace, _, rest = name.partition("::")
        if namespace != "aten" or ("out" not in rest.partition(".")[2] and "." not in rest):
            continue
        base, _, overload = rest.partition(".")
        op = getattr(getattr(aten, base, None), overload or "default", None)
        if op is not None and is_composite_out(op):
            library.impl(rest, _composite_kernel(op), "AutogradPrivateUse1")
