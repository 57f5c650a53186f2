"""A template for fixed literals as a `torch.fx.Graph`: what rewrites work on and engines are made from.

Placeholders are the template's externals in order, each call is an aten overload with plain arguments, the
output is the list of kept values. ``node.meta["spec"]`` is the `Spec` that the value had in a run that was
observed, ``node.meta["instruction"]`` the number of the template's instruction that it comes from,
``node.meta["slot"]`` the template's slot, ``node.meta["literals"]`` the range of the ints that a call took.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from genie.server.engine import Template
from genie.server.ops import CompiledOp


class NotSpecializableError(Exception):
    """Why a template stays with the eager engine."""


class TooAlikeError(NotSpecializableError):
    """Two runs do not tell what differs between runs; two others may."""


@dataclass(frozen=True)
class Spec:
    """Geometry of one tensor, in elements. ``storage`` numbers the storages of one run: equal for values
    that share memory."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    storage: int = -1


def spec_of(value: Tensor, storages: dict[int, int]) -> Spec:
    key = value.untyped_storage()._cdata
    number = storages.setdefault(key, len(storages))
    return Spec(tuple(value.shape), value.stride(), value.dtype, number)


class Observation:
    """The specs of all that one run of a template took and made."""

    def __init__(self, ext: Sequence[Tensor]) -> None:
        self._storages: dict[int, int] = {}
        self._alive: list[Tensor] = list(ext)  # so that no storage's number is used twice
        self.ext = [spec_of(t, self._storages) for t in ext]
        self.made: dict[int, list[Spec | None]] = {}  # by instruction: of its new values

    def add(self, instruction: int, values: Sequence[Tensor | None]) -> None:
        self._alive += [v for v in values if v is not None]
        self.made[instruction] = [None if v is None else spec_of(v, self._storages) for v in values]

    def end(self) -> None:
        self._alive.clear()


def specialize(
    template: Template, literals: Sequence[int], floats: Sequence[float], seen: Observation
) -> fx.Graph:
    """The program with its literals in place. Raises NotSpecializableError."""
    if template.mutated_ext:
        raise NotSpecializableError("it writes to its externals")
    graph = fx.Graph()
    values: dict[int, fx.Node | None] = {}
    for k, external in enumerate(seen.ext):
        node = graph.placeholder(f"e{k}")
        node.meta["spec"] = external
        values[-k - 1] = node
    ints, reals = iter(literals), iter(floats)
    taken = 0
    for number, (op, reads, new) in enumerate(template.instructions):
        if op.nested:
            raise NotSpecializableError(f"{op.name} returns lists")
        if not isinstance(op.target, torch._ops.OpOverload):
            raise NotSpecializableError(f"{op.name} is no op of torch")
        tensors = iter([values[s] for s in reads])
        args, kwargs = _arguments(op, tensors, ints, reals)
        if op.random and _drop_probability(op.target, args, kwargs) != 0:
            raise NotSpecializableError(f"{op.name} draws random numbers")
        call = graph.call_function(op.target, args, kwargs)
        call.meta["instruction"] = number
        call.meta["literals"] = range(taken, taken + op.n_ints)
        taken += op.n_ints
        fresh: Any = iter(zip(new, seen.made.get(number, ()), strict=True))
        for k, out in enumerate(op.outs):
            if out != -1:
                continue
            slot, spec = next(fresh)
            node = call
            if not op.single:
                node = graph.call_function(operator.getitem, (call, k))
                node.meta["instruction"] = number
            node.meta.update(spec=spec, slot=slot)
            order = template.layouts.get(slot)
            if order is not None and spec is not None and not _is_ordered(spec, order):
                node = graph.call_function(_ordered, (node, order))
                node.meta.update(spec=spec, slot=slot, instruction=number)
            values[slot] = node if spec is not None else None
    graph.output([values[s] for s in template.kept])
    return graph


def _drop_probability(op: torch._ops.OpOverload, args: tuple, kwargs: dict) -> float | None:
    """With which an attention drops weights; None for other ops that draw random numbers."""
    for position, argument in enumerate(op._schema.arguments):
        if argument.name == "dropout_p":
            value = (
                args[position] if position < len(args) else kwargs.get("dropout_p", argument.default_value)
            )
            return None if value is None else float(value)
    return None


def _is_ordered(spec: Spec, order: Sequence[int]) -> bool:
    """Whether the value is dense with its dimensions in ``order`` from the outermost in."""
    step = 1
    for d in reversed(order):
        if spec.shape[d] != 1:
            if spec.stride[d] != step:
                return False
            step *= spec.shape[d]
    return True


def _ordered(value: Tensor, order: Sequence[int]) -> Tensor:
    from genie.server.engine import _in_order

    return _in_order(value, tuple(order))


def _arguments(op: CompiledOp, tensors: Any, ints: Any, reals: Any) -> tuple[tuple, dict]:
    def one(kind: str, payload: Any) -> Any:
        if kind == "t":
            return next(tensors)
        if kind == "i":
            return next(ints)
        if kind == "f":
            return next(reals)
        if kind == "il":
            return [next(ints) for _ in range(payload)]
        if kind == "fl":
            return [next(reals) for _ in range(payload)]
        if kind == "tl":
            return [next(tensors) for _ in range(payload)]
        if kind == "ol":
            return [next(tensors) if present else None for present in payload]
        return payload

    return (
        tuple(one(k, p) for k, p in op.args),
        {key: one(k, p) for key, (k, p) in op.kwargs},
    )
