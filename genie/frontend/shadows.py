"""Keeps host-known copies of small values up to date, so that reading them costs no round trip.

`generate()` reads a few tiny tensors that follow from Python numbers alone (masks, lengths); their
ops are applied to CPU copies, of those values that are read. Only ops listed here carry a shadow on: all are
deterministic, and exact on every device.
"""

from __future__ import annotations

from typing import Any

import torch

from genie.frontend.handle import Shadow
from genie.frontend.tensor import LazyTensor

aten = torch.ops.aten

SIZED_BY_FLOATS = frozenset({
    aten.arange.default, aten.arange.start, aten.arange.start_step, aten.range.default, aten.range.step,
    aten.arange.out, aten.arange.start_out, aten.range.out, aten.range.out_,
})  # fmt: skip

_VIEWS = frozenset({
    aten.view.default, aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.default, aten.expand.default,
    aten.slice.Tensor, aten.select.int, aten.t.default, aten.transpose.int, aten.permute.default,
    aten._unsafe_view.default, aten.unbind.int,
})  # fmt: skip
_PURE = frozenset({
    aten.full.default, aten.zeros.default, aten.ones.default, aten.scalar_tensor.default,
    aten.arange.default, aten.arange.start, aten.arange.start_step, aten.full_like.default,
    aten.zeros_like.default, aten.ones_like.default, aten.new_ones.default, aten.new_zeros.default,
    aten.new_full.default,
    aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.rsub.Scalar,
    aten.eq.Scalar, aten.ne.Scalar, aten.lt.Scalar, aten.le.Scalar, aten.gt.Scalar, aten.ge.Scalar,
    aten.eq.Tensor, aten.ne.Tensor, aten.lt.Tensor, aten.le.Tensor, aten.gt.Tensor, aten.ge.Tensor,
    aten.bitwise_and.Tensor, aten.bitwise_or.Tensor, aten.bitwise_not.default,
    aten.logical_and.default, aten.logical_or.default, aten.logical_not.default,
    aten.all.default, aten.any.default, aten.all.dim, aten.any.dim, aten.max.default, aten.min.default,
    aten.sum.default, aten.sum.dim_IntList, aten.cumsum.default, aten.cat.default, aten.clone.default,
    aten._to_copy.default, aten.isin.Tensor_Tensor, aten.isin.Tensor_Scalar, aten.where.self,
    aten.masked_fill.Scalar, aten.eye.default, aten.constant_pad_nd.default,
})  # fmt: skip
_IN_PLACE = frozenset({
    aten.add_.Tensor, aten.sub_.Tensor, aten.mul_.Tensor, aten.fill_.Scalar, aten.zero_.default,
    aten.copy_.default, aten.masked_fill_.Scalar,
})  # fmt: skip
_INTEGRAL = frozenset({torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64})


#: deferred shadows that are computed one after another at the most, when one is asked for
_DEEPEST = 16


class Deferred(Shadow):
    """The shadow of an op's ``index``-th output (None: of its only one), computed when ``tensor`` is first
    read. Its arguments hold shadows in the place of tensors."""

    __slots__ = ("_call", "_index", "depth")

    def __init__(self, call: _Call, index: int | None, alive: list[bool], depth: int) -> None:
        self._call, self._index, self.alive, self.depth = call, index, alive, depth

    def __getattr__(self, name: str) -> Any:
        if name != "tensor":
            raise AttributeError(name)
        values = self._call.values()
        self.tensor = values if self._index is None else values[self._index]
        self.depth = 0
        del self._call  # and with it the shadows that it was computed from
        return self.tensor


class _Call:
    """An op on shadows, run once for all its outputs."""

    __slots__ = ("_args", "_func", "_kwargs", "_values")

    def __init__(self, func: Any, args: list, kwargs: dict[str, Any]) -> None:
        self._func, self._args, self._kwargs = func, args, kwargs
        self._values: Any = None

    def values(self) -> Any:
        if self._values is None:
            # Not in the mode of whoever reads it: it may be written to, and read, in another one.
            with torch.inference_mode(False), torch.no_grad():
                self._values = self._func(*_computed(self._args), **_computed(self._kwargs))
            self._args, self._kwargs = [], {}
        return self._values


def _computed(value: Any) -> Any:
    if isinstance(value, Shadow):
        return value.tensor
    if isinstance(value, list):
        return [_computed(v) for v in value]
    if isinstance(value, dict):
        return {k: _computed(v) for k, v in value.items()}
    return value


def _host(value: Any, found: list[Shadow]) -> Any:
    """The argument with tensors replaced by shadows; raises LookupError when one is gone."""
    if isinstance(value, LazyTensor):
        shadow = value._h.shadow
        if shadow is None or not shadow.alive[0]:
            raise LookupError
        found.append(shadow)
        return shadow
    if isinstance(value, (list, tuple)):
        return [_host(v, found) for v in value]
    if isinstance(value, torch.device):
        return torch.device("cpu")
    return value


def propagate(func: Any, args: tuple, kwargs: dict[str, Any], outs: Any) -> None:
    """Gives the outputs of a recorded op shadows, when the op and its inputs allow it."""
    view = func in _VIEWS
    if not view and func not in _PURE:
        return
    # Floating-point results may differ in the last bit between devices: only exact values count.
    if not view and any(o._spec.dtype not in _INTEGRAL for o in outs):
        return
    found: list[Shadow] = []
    try:
        call = _Call(
            func,
            [_host(a, found) for a in args],
            {k: _host(v, found) for k, v in kwargs.items() if k != "pin_memory"},
        )
    except LookupError:
        return
    depth = 1 + max((s.depth for s in found), default=0)
    waiting = outs[0]._h.rec.deferred
    several = len(outs) > 1 or func is aten.unbind.int
    for index, out in enumerate(outs):
        alive = args[0]._h.shadow.alive if view else [True]
        shadow = out._h.shadow = Deferred(call, index if several else None, alive, depth)
        if depth < _DEEPEST:
            waiting.add(shadow)
        else:
            shadow.tensor  # noqa: B018 - computes it


def write(func: Any, args: tuple, kwargs: dict[str, Any], tensors: list, known: bool) -> None:
    """Applies an in-place op to shadows, or kills those of everything that it writes to."""
    target = tensors[0]._h.shadow if tensors else None
    if known and target is not None and func in _IN_PLACE and tensors[0]._spec.dtype in _INTEGRAL:
        try:
            found: list[Shadow] = []
            hosts = [_host(a, found) for a in args]
            host_kwargs = {k: _host(v, found) for k, v in kwargs.items()}
        except LookupError:
            pass
        else:
            waiting = tensors[0]._h.rec.deferred
            for shadow in waiting:
                shadow.tensor  # noqa: B018 - computes it from what was there before
            waiting.clear()
            func(*_computed(hosts), **_computed(host_kwargs))
            return
    kill(tensors)


def kill(tensors: list) -> None:
    """Forgets the shadows of these tensors and of all their aliases: a write may reach them unseen."""
    for t in tensors:
        shadow = t._h.shadow
        if shadow is not None:
            shadow.alive[0] = False
            t._h.shadow = None
