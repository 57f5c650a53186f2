"""What is compared of a result: values, dtypes, shapes, strides, identity and shared memory."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch

from genie.frontend.tensor import LazyTensor

DEVICE = "genie"


class Differs(Exception):
    """A result is not what it is on the CPU."""


class ValuesDiffer(Differs):
    """The ``index``-th of the ``group`` ("results", "operands", or "" for gradients) is numerically off."""

    def __init__(self, message: str, group: str, index: int, expected: torch.Tensor, got: torch.Tensor):
        super().__init__(message)
        self.group, self.index, self.expected, self.got = group, index, expected, got


@dataclass
class TensorFacts:
    value: torch.Tensor | None
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    requires_grad: bool


@dataclass
class Facts:
    results: list[Any]  # flattened; tensors as TensorFacts
    operands: list[Any]  # after the call: what the op wrote
    same: list[tuple[int, int]]  # (result, operand) that are one Python object
    alias: list[tuple[int, int]]  # (result, operand) that share memory
    sees_memory: bool  # False for a server in another process: its memory cannot be looked at


def _flat(value: Any) -> list[Any]:
    if isinstance(value, (list, tuple)):
        return [x for v in value for x in _flat(v)]
    if isinstance(value, dict):
        return [x for v in value.values() for x in _flat(v)]
    return [value]


def fact(value: Any, with_value: bool) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    host = value.detach().cpu() if with_value else None
    if host is not None:
        if host.layout is not torch.strided:
            host = host.to_dense()
        host = host.resolve_conj().resolve_neg().clone()
    stride = value.stride() if value.layout is torch.strided else ()
    return TensorFacts(host, value.dtype, tuple(value.shape), stride, value.requires_grad)


def facts(result: Any, operands: list[torch.Tensor], with_value: bool) -> Facts:
    flat = _flat(result)
    tensors = [(i, r) for i, r in enumerate(flat) if isinstance(r, torch.Tensor)]
    storages = {id(t): _storage(t) for t in (*operands, *(r for _, r in tensors))}
    same, alias = [], []
    for i, r in tensors:
        for k, t in enumerate(operands):
            if r is t:
                same.append((i, k))
            elif storages[id(r)] is not None and storages[id(r)] == storages[id(t)]:
                alias.append((i, k))
    results = [fact(r, with_value) for r in flat]
    sees = not any(isinstance(r, LazyTensor) and _store_of(r) is None for _, r in tensors)
    return Facts(results, [fact(t, True) for t in operands], same, alias, sees)


def _store_of(t: LazyTensor) -> Any:
    return getattr(t._h.rec.executor, "store", None)


def _storage(t: torch.Tensor) -> tuple[str, int] | None:
    """Names the memory behind a tensor; None for one without elements, or in another process."""
    if t.layout is not torch.strided or not t.numel():
        return None
    if isinstance(t, LazyTensor):
        store, recorder = _store_of(t), t._h.rec
        if store is None:
            return None
        gid = recorder.gid_of(t)
        recorder.flush()
        return DEVICE, store.get(gid).untyped_storage().data_ptr()
    return t.device.type, t.untyped_storage().data_ptr()


def compare(expected: Facts, got: Facts, strict_strides: bool) -> None:
    aliased = {i for i, _ in expected.alias + expected.same}
    if expected.same != got.same:
        raise Differs(f"(result, operand) that are one tensor: {expected.same} on the CPU, {got.same} here")
    if got.sees_memory and expected.alias != got.alias:
        raise Differs(f"(result, operand) that share memory: {expected.alias} on the CPU, {got.alias} here")
    compare_lists(expected.results, got.results, "result", strict_strides, aliased, "results")
    compare_lists(expected.operands, got.operands, "operand after the call", True, group="operands")


def compare_lists(
    expected: list[Any],
    got: list[Any],
    where: str,
    strict_strides: bool,
    aliased: Collection[int] = (),
    group: str = "",
) -> None:
    if len(expected) != len(got):
        raise Differs(f"{where}: {len(expected)} on the CPU, {len(got)} here")
    for i, (e, g) in enumerate(zip(expected, got, strict=True)):
        if not isinstance(e, TensorFacts) or not isinstance(g, TensorFacts):
            _compare_plain(e, g, f"{where} {i}")
            continue
        for name in ("dtype", "shape", "requires_grad"):
            if getattr(e, name) != getattr(g, name):
                raise Differs(f"{where} {i}: {name} {getattr(e, name)} on the CPU, {getattr(g, name)} here")
        if (strict_strides or i in aliased) and not _same_strides(e, g):
            raise Differs(f"{where} {i}: strides {e.stride} on the CPU, {g.stride} here (shape {e.shape})")
        if e.value is not None and g.value is not None:
            try:
                torch.testing.assert_close(g.value, e.value, equal_nan=True, check_stride=False)
            except AssertionError as exc:
                raise ValuesDiffer(f"{where} {i}: {exc}", group, i, e.value, g.value) from None


def _same_strides(e: TensorFacts, g: TensorFacts) -> bool:
    if 0 in e.shape:
        return True
    return all(n <= 1 or a == b for n, a, b in zip(e.shape, e.stride, g.stride, strict=True))


def _compare_plain(e: Any, g: Any, where: str) -> None:
    if isinstance(e, torch.device) and isinstance(g, torch.device):
        return
    if type(e) is not type(g):
        raise Differs(f"{where}: {e!r} on the CPU, {g!r} here")
    if isinstance(e, (bool, int, float, complex)):
        try:
            torch.testing.assert_close(g, e, equal_nan=True)
        except AssertionError as exc:
            raise Differs(f"{where}: {exc}") from None
    elif e != g:
        raise Differs(f"{where}: {e!r} on the CPU, {g!r} here")
