"""Removes calls that only pass a value on: copies that nobody can tell from the original, views of the whole.

A copy matters where either side is written to, or where the copy outlives the program (what keeps it may
write to it later). Sums with a zero stay for floats: they turn -0.0 into 0.0.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from genie.server.engines.rewrite.facts import (
    VIEWS,
    argument,
    aten,
    kept,
    overload,
    same_geometry,
    spec,
    storages,
    written_storages,
)
from genie.server.engines.specialize import Spec

_COPIES = frozenset(
    {aten.clone.default, aten._to_copy.default, aten.contiguous.default, aten.reshape.default}
)
_FILLED = {aten.full.default: None, aten.zeros.default: 0, aten.ones.default: 1, aten.zeros_like.default: 0}
#: the operand that leaves the other one as it is, and whether it may stand first
_NEUTRAL = {
    aten.mul.Tensor: (1, True), aten.mul.Scalar: (1, False), aten.div.Tensor: (1, False),
    aten.div.Scalar: (1, False), aten.add.Tensor: (0, True), aten.add.Scalar: (0, False),
    aten.sub.Tensor: (0, False), aten.sub.Scalar: (0, False), aten.bitwise_or.Tensor: (0, True),
    aten.logical_or.default: (0, True), aten.bitwise_and.Tensor: (-1, True),
}  # fmt: skip


def copies(graph: fx.Graph) -> int:
    changed = 0
    outputs = kept(graph)
    lasting, stable = storages(outputs), written_storages(graph)
    for node in list(graph.nodes):
        source = _passed_on(node)
        if source is None or node in outputs:
            continue
        made, original = spec(node), spec(source)
        assert made is not None and original is not None
        if {made.storage, original.storage} & stable:
            continue
        if made.storage != original.storage:
            if made.storage in lasting:
                continue
            renumber(graph, made.storage, original.storage)
        node.replace_all_uses_with(source)
        graph.erase_node(node)
        changed += 1
    return changed


def renumber(graph: fx.Graph, old: int, new: int) -> None:
    """What shared memory ``old`` shares memory ``new`` from now on."""
    for node in graph.nodes:
        s = spec(node)
        if s is not None and s.storage == old:
            node.meta["spec"] = Spec(s.shape, s.stride, s.dtype, new)


def _passed_on(node: fx.Node) -> fx.Node | None:
    """The value that the call makes again, element for element in the same places of its memory."""
    op = overload(node)
    if op is None or spec(node) is None:
        return None
    source: Any = None
    if op in VIEWS or op in _COPIES:
        source = node.args[0]
    elif op in _NEUTRAL:
        source = _unchanged(node)
    if not isinstance(source, fx.Node) or not same_geometry(spec(source), spec(node)):
        return None
    return source


def _unchanged(node: fx.Node) -> fx.Node | None:
    neutral, commutes = _NEUTRAL[node.target]  # type: ignore[index]
    if node.kwargs or len(node.args) != 2:
        return None  # a scaled sum, a rounded quotient
    first, second = node.args
    made = spec(node)
    assert made is not None
    floats = made.dtype.is_floating_point or made.dtype.is_complex
    if neutral == 0 and floats:
        return None
    if neutral == -1:  # all bits set
        if made.dtype != torch.bool:
            return None
        neutral = 1
    for source, other in ((first, second), (second, first))[: 1 + commutes]:
        if isinstance(source, fx.Node) and _constant(other) == neutral:
            return source
    return None


def _constant(value: Any) -> Any:
    """The number that all elements are; None for a value with others."""
    if not isinstance(value, fx.Node):
        return value
    op = overload(value)
    if op not in _FILLED:
        return None
    return argument(value, "fill_value") if op is aten.full.default else _FILLED[op]
