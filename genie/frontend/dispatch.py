"""Which handler takes which op: copies, syncs, factories and metadata have their own."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor
from torch._guards import TracingContext

from genie.errors import UnsupportedOpError
from genie.frontend import arguments, composites, outputs, session
from genie.frontend.handle import UNRECORDED, Handle
from genie.frontend.recorder import HostOperandError
from genie.frontend.specs import spec, spec_of
from genie.frontend.tensor import LazyTensor, wrap, wrap_view

aten = torch.ops.aten
_LIBRARY: list[torch.library.Library] = []


def _recorder_of(args: Any, kwargs: dict[str, Any]) -> Any:
    """The recorder of the first lazy tensor among the arguments, else the current session's."""
    for a in args:
        if a.__class__ is LazyTensor:
            return a._h.rec
        if a.__class__ is list or a.__class__ is tuple:
            for x in a:
                if x.__class__ is LazyTensor:
                    return x._h.rec
    for a in kwargs.values():
        if a.__class__ is LazyTensor:
            return a._h.rec
    return session.current().recorder


def _record(func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    if args and args[0].__class__ is LazyTensor:
        recorder = args[0]._h.rec
    else:
        recorder = _recorder_of(args, kwargs)
    try:
        return recorder.record(func, args, kwargs)
    except HostOperandError:
        args, kwargs = _lift_host_tensors(func, recorder, args, kwargs)
    except outputs.NeedsFunctionalForm:
        return outputs.functional_then_write(func, args, kwargs)
    try:
        return recorder.record(func, args, kwargs)
    except outputs.NeedsFunctionalForm:
        return outputs.functional_then_write(func, args, kwargs)


_INDEXING = frozenset({
    aten.index.Tensor, aten.index_put_.default, aten.index_put.default, aten._index_put_impl_.default,
    aten._unsafe_index.Tensor,
})  # fmt: skip


def _lift_host_tensors(func: Any, recorder: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict]:
    """0-dim CPU tensors and CPU indices may meet device tensors, as on any other device: to be read."""
    names = [a.name for a in func._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    bound = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | kwargs
    for name in names:
        written = bound.get(name)
        if isinstance(written, Tensor) and not isinstance(written, LazyTensor):
            raise RuntimeError(
                f"Expected all tensors to be on the same device, but {func} writes to a tensor on "
                f"'{written.device}' and got others on 'genie:0': move the operands with .cpu()"
            )

    def lift(a: Any) -> Any:
        if isinstance(a, (list, tuple)):
            return [lift(x) for x in a]
        if not isinstance(a, Tensor) or isinstance(a, LazyTensor):
            return a
        if a.layout is not torch.strided:
            raise UnsupportedOpError(
                f"{func}: layout {a.layout} is not supported: use dense (strided) tensors"
            )
        if a.dim() and func not in _INDEXING:
            raise RuntimeError(
                f"Expected all tensors to be on the same device, but {func} got tensors on 'genie:0' and "
                f"'{a.device}': move the CPU tensor with .to('genie')"
            )
        handle = recorder.bind_host(_dense(a.detach()), False)
        # The gradient of the CPU tensor keeps the other operands, as that of a device tensor would.
        return wrap(spec_of(_dense(a)), handle).requires_grad_(a.requires_grad)

    return tuple(lift(a) for a in args), {k: lift(v) for k, v in kwargs.items()}


def _dense(t: Tensor) -> Tensor:
    """``t`` itself when its elements fill a block of memory, else a contiguous copy."""
    t = t.resolve_conj().resolve_neg()
    step = 1
    for stride, size in sorted(zip(t.stride(), t.shape, strict=True)):
        if size != 1:
            if stride != step:
                return t.contiguous()
            step *= size
    return t


def upload(src: Tensor, dtype: torch.dtype | None = None) -> LazyTensor:
    """A CPU tensor's present content on device ``genie``."""
    recorder = session.current().recorder
    is_parameter = isinstance(src, torch.nn.Parameter)
    if src.device.type != "cpu":
        src = src.cpu()
    if src.layout is not torch.strided:
        raise UnsupportedOpError(f"layout {src.layout} is not supported: use dense (strided) tensors")
    dense = _dense(src.detach() if dtype is None else src.detach().to(dtype))
    s = spec(tuple(dense.shape), dense.stride(), 0, dense.dtype)
    return wrap(s, recorder.bind_host(dense, is_parameter))


def to_cpu(t: LazyTensor, cause: str = "cpu") -> Tensor:
    return t._h.rec.fetch([t], cause)[0]


# -- handlers --------------------------------------------------------------------------------------


def _empty(func: Any, args: tuple, kwargs: dict[str, Any]) -> LazyTensor:
    """``empty`` is recorded only when something uses it: most are overwritten by an upload at once."""
    kwargs = {
        k: v for k, v in kwargs.items() if v is not None and k not in ("pin_memory", "layout", "device")
    }
    kwargs.setdefault("dtype", torch.get_default_dtype())
    template = func(*args, **kwargs, device="meta")
    handle = Handle(session.current().recorder, UNRECORDED)
    s = spec_of(template)
    handle.empty = (aten.empty_strided.default, (list(s.shape), list(s.stride)),
                    {"dtype": s.dtype, "device": torch.device("genie")})  # fmt: skip
    return wrap(s, handle)


def _to_copy(func: Any, args: tuple, kwargs: dict[str, Any]) -> Tensor:
    src = args[0]
    device = kwargs.get("device")
    if device is not None and device.type == "cpu":
        value = to_cpu(src)
        rest = {k: v for k, v in kwargs.items() if k in ("dtype", "memory_format") and v is not None}
        return value.to(**rest) if rest else value
    if device is not None and device.type != "genie":
        return to_cpu(src).to(
            **{k: v for k, v in kwargs.items() if k not in ("non_blocking", "pin_memory", "layout")}
        )
    kwargs = {k: v for k, v in kwargs.items() if k in ("dtype", "memory_format") and v is not None}
    return src._h.rec.record(func, (src,), kwargs)


def _copy_(func: Any, args: tuple, kwargs: dict[str, Any]) -> Tensor:
    dst, src = args[0], args[1]
    if not isinstance(dst, LazyTensor):
        return dst.copy_(to_cpu(src))
    if isinstance(src, LazyTensor):
        return dst._h.rec.record(func, (dst, src), {})
    h = dst._h
    if h.gid == UNRECORDED and h.rec is session.current().recorder and src.shape == dst.shape:
        dense = _dense_like(src.detach(), dst)
        bound = h.rec.bind_host(dense, isinstance(src, torch.nn.Parameter))
        h.gid, bound.gid = bound.gid, UNRECORDED
        h.shadow, h.empty = bound.shadow, None
        return dst
    lifted = wrap(*_host_operand(h.rec, src, dst.dtype))
    return h.rec.record(aten.copy_.default, (dst, lifted), {})


def _host_operand(recorder: Any, src: Tensor, dtype: torch.dtype) -> tuple:
    dense = _dense(src.detach().to(dtype))
    return spec(tuple(dense.shape), dense.stride(), 0, dense.dtype), recorder.bind_host(dense, False)


def _dense_like(src: Tensor, dst: LazyTensor) -> Tensor:
    """``src`` in ``dst``'s dtype and strides."""
    src = src.resolve_conj().resolve_neg()
    if src.device.type != "cpu":
        src = src.cpu()
    if src.dtype == dst.dtype and src.stride() == dst.stride():
        return src
    return torch.empty_strided(dst._spec.shape, dst._spec.stride, dtype=dst.dtype).copy_(src)


def _copy_from(src: Tensor, dst: Tensor, non_blocking: bool = False) -> Tensor:
    return _copy_(aten.copy_.default, (dst, src), {})


def _local_scalar(func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    return to_cpu(args[0], "item").item()


def _equal(func: Any, args: tuple, kwargs: dict[str, Any]) -> bool:
    a, b = args
    if not isinstance(a, LazyTensor) or not isinstance(b, LazyTensor):
        raise RuntimeError("torch.equal got tensors on 'genie' and on another device: move one of them")
    if a.shape != b.shape:
        return False
    return bool(aten.all.default(aten.eq.Tensor(a, b)).item())


def _allclose(func: Any, args: tuple, kwargs: dict[str, Any]) -> bool:
    return bool(aten.all.default(aten.isclose.default(*args, **kwargs)).item())


def _detach(func: Any, args: tuple, kwargs: dict[str, Any]) -> LazyTensor:
    t = args[0]
    return wrap_view(t._spec, t._h, t)


def _identity(func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    return args[0]


def _lift_fresh(func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """The end of ``torch.tensor``. While Dynamo traces, its fake goes on instead of the real tensor."""
    if TracingContext.try_get() is not None:
        from genie.frontend.replay.dynamo import fake_of, tracing_fake_mode

        mode = tracing_fake_mode()
        if mode is not None:
            return fake_of(args[0], mode)
    return args[0]


def _false(func: Any, args: tuple, kwargs: dict[str, Any]) -> bool:
    return False


def _metadata_in_place(out_of_place: Any) -> Any:
    """t_(), squeeze_() and friends: the tensor becomes the view that the functional form makes."""

    def handler(func: Any, args: tuple, kwargs: dict[str, Any]) -> LazyTensor:
        t = args[0]
        outputs.become(t, t._h.rec.record(out_of_place, args, kwargs))
        return t

    return handler


def _physical(replacement: Any) -> Any:
    def handler(func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        return args[0]._h.rec.record(replacement, args, kwargs)

    return handler


def _unsupported(why: str) -> Any:
    def handler(func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        raise UnsupportedOpError(f"{func} is not supported on device 'genie': {why}")

    return handler


def _decompose(func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    return func.decompose(*args, **kwargs)


def _kept_composite(func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    if composites.training(func, args):
        return func.decompose(*args, **kwargs)
    return _record(func, args, kwargs)


_SPECIAL: dict[Any, Any] = {
    aten._to_copy.default: _to_copy,
    aten.copy_.default: _copy_,
    aten._local_scalar_dense.default: _local_scalar,
    aten.equal.default: _equal,
    aten.detach.default: _detach,
    aten.alias.default: _detach,
    aten.lift_fresh.default: _lift_fresh,
    aten.lift.default: _identity,
    aten.detach_.default: _identity,
    aten.is_pinned.default: _false,
    aten.t_.default: _metadata_in_place(aten.t.default),
    aten.transpose_.default: _metadata_in_place(aten.transpose.int),
    aten.squeeze_.default: _metadata_in_place(aten.squeeze.default),
    aten.squeeze_.dim: _metadata_in_place(aten.squeeze.dim),
    aten.squeeze_.dims: _metadata_in_place(aten.squeeze.dims),
    aten.unsqueeze_.default: _metadata_in_place(aten.unsqueeze.default),
    aten.as_strided_.default: _metadata_in_place(aten.as_strided.default),
    aten._conj.default: _physical(aten.conj_physical.default),
    aten._neg_view.default: _physical(aten.neg.default),
    aten.resize_.default: outputs.resize_in_place,
    aten.resize_as_.default: outputs.resize_in_place,
    aten.set_.source_Tensor: _unsupported("assign the tensor instead"),
    aten.set_.source_Storage: _unsupported("assign the tensor instead"),
    aten.set_.source_Storage_storage_offset: _unsupported("assign the tensor instead"),
    aten._pin_memory.default: _unsupported("device tensors cannot be pinned"),
    aten.allclose.default: _allclose,
    **{
        op: _unsupported("sparse tensors have no remote form; move it to the CPU first")
        for op in (
            aten.to_sparse.default,
            aten.to_sparse.sparse_dim,
            aten._to_sparse.default,
            aten._to_sparse.sparse_dim,
            aten._to_sparse_csr.default,
            aten._to_sparse_csc.default,
            aten._to_sparse_bsr.default,
            aten._to_sparse_bsc.default,
        )
    },
}


def special_ops() -> Collection[Any]:
    """Ops that are more than one instruction, or none."""
    return _SPECIAL.keys()


def choose_handler(func: Any) -> Any:
    """Decides once per op; called by ``__torch_dispatch__`` on first sight."""
    handler = _SPECIAL.get(func)
    if handler is None:
        if func in composites.KEPT:
            handler = _kept_composite
        elif func.namespace != "aten":
            handler = _foreign(func)
        elif outputs.is_composite_out(func):
            handler = outputs.composite_handler
        elif torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
            handler = _decompose
        elif any(a.name == "device" for a in func._schema.arguments):
            handler = _record_or_leave
        else:
            handler = _record
    func._genie_handler = handler  # an attribute, because ops hash slowly
    return handler


def _record_or_leave(func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """``zeros_like(x, device="cpu")`` and its like: of ``x`` they need the geometry only, not the values."""
    device = kwargs.get("device")
    if device is None or device.type == "genie":
        return _record(func, args, kwargs)

    def stand_in(t: Tensor) -> Tensor:
        if not isinstance(t, LazyTensor):
            return t
        return torch.empty_strided(t._spec.shape, t._spec.stride, dtype=t.dtype, device="cpu")

    return func(*[arguments.map_tensors(a, stand_in) for a in args], **kwargs)


def _foreign(func: Any) -> Any:
    """Ops from outside PyTorch: one written in Python for every device runs here, op by op."""
    if not torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeExplicitAutograd"):
        return _unsupported("only ATen ops cross the wire: run this op on the CPU, or decompose it")
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.PrivateUse1)

    def handler(func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        return func.redispatch(keys, *args, **kwargs)

    return handler


_EMPTIES = ("empty.memory_format", "empty_strided")


def register() -> None:
    """Factories have no tensor argument, so no subclass sees them: they get PrivateUse1 kernels."""
    library = torch.library.Library("aten", "IMPL")
    _LIBRARY.append(library)
    for name in _EMPTIES:
        op = composites.overload(name)
        library.impl(name, _factory(op, _empty), "PrivateUse1")
    library.impl("_copy_from", _copy_from, "PrivateUse1")
    library.impl("_efficientzerotensor", _factory(aten.zeros.default, _record_factory), "PrivateUse1")
    outputs.register(library)
    for name in (
        "full", "zeros", "ones", "arange.start_step", "arange.start", "arange", "scalar_tensor", "eye",
        "eye.m", "linspace", "logspace", "rand", "randn", "randint", "randint.low", "randperm",
        "tril_indices",
        "triu_indices", "hann_window", "hann_window.periodic", "hamming_window", "bartlett_window",
        "blackman_window", "kaiser_window", "range", "range.step",
    ):  # fmt: skip
        op = composites.overload(name)
        if op is not None and not torch._C._dispatch_has_kernel_for_dispatch_key(
            op.name(), "CompositeImplicitAutograd"
        ):
            library.impl(name, _factory(op, _record_factory), "PrivateUse1")


def _factory(op: Any, handler: Any) -> Any:
    def kernel(*args: Any, **kwargs: Any) -> Any:
        return handler(op, args, kwargs)

    return kernel


def _record_factory(func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    kwargs = {k: v for k, v in kwargs.items() if v is not None and k not in ("pin_memory", "layout")}
    kwargs["device"] = torch.device("genie")
    return session.current().recorder.record(func, args, kwargs)
