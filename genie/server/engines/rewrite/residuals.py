"""A residual stream that a product is added to takes the product in place: one kernel instead of two.

``residual + linear(x, w)`` without a bias is ``residual.addmm_(x, w.t())`` where nobody reads the residual
afterwards. The sum is then rounded once, in the accumulator of the product. (Not in place it would save
nothing: ``addmm`` copies the matrix that it adds to. With a bias neither: the product takes one addend.)
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from typing import Any, NamedTuple

from torch import fx

from genie.server.engines.rewrite.facts import (
    argument,
    aten,
    insert,
    is_dense,
    kept,
    overload,
    same_geometry,
    spec,
    storages,
    written_storages,
)


class _Sum(NamedTuple):
    root: fx.Node
    residual: fx.Node
    product: fx.Node
    x: fx.Node
    weight: fx.Node


class _Memory:
    """Who shares which memory, kept up to date while sums move into place."""

    def __init__(self, graph: fx.Graph) -> None:
        self.sharing: dict[int, list[fx.Node]] = defaultdict(list)
        for node in graph.nodes:
            self.add(node)
        self.foreign = storages([*kept(graph), *(n for n in graph.nodes if n.op == "placeholder")])
        self.written = written_storages(graph)

    def add(self, node: fx.Node) -> None:
        s = spec(node)
        if s is not None:
            self.sharing[s.storage].append(node)

    def becomes(self, old: int, new: int) -> None:
        """What was computed into memory ``old`` is now written to ``new``."""
        for node in self.sharing.pop(old):
            if not node._erased:
                node.meta["spec"] = replace(node.meta["spec"], storage=new)
                self.sharing[new].append(node)
        self.written.add(new)
        if old in self.foreign:
            self.foreign.add(new)


def residuals(graph: fx.Graph) -> int:
    changed = 0
    memory = _Memory(graph)
    for node in list(graph.nodes):
        if overload(node) is not aten.add.Tensor or len(node.args) != 2 or node.kwargs:
            continue
        for residual, product in (node.args, node.args[::-1]):
            found = _sum(node, residual, product)
            if found is not None and _is_last_reader(memory, found):
                _in_place(memory, found)
                changed += 1
                break
    return changed


def _sum(root: fx.Node, residual: Any, product: Any) -> _Sum | None:
    if overload(product) is not aten.linear.default or len(product.users) != 1 or residual is product:
        return None
    x, weight = argument(product, "input"), argument(product, "weight")
    if argument(product, "bias") is not None or not isinstance(residual, fx.Node):
        return None
    specs = [spec(n) for n in (root, residual, product, x, weight)]
    if any(s is None or s.dtype != specs[0].dtype or not s.dtype.is_floating_point for s in specs):  # type: ignore[union-attr]
        return None
    made, stream, _, rows, matrix = specs
    if not same_geometry(made, stream) or not same_geometry(made, specs[2]):
        return None
    if not is_dense(stream) or not is_dense(rows) or len(matrix.shape) != 2 or len(stream.shape) < 2:  # type: ignore[arg-type, union-attr]
        return None
    return _Sum(root, residual, product, x, weight)


def _is_last_reader(memory: _Memory, found: _Sum) -> bool:
    stream = spec(found.residual)
    assert stream is not None
    if stream.storage in memory.foreign:
        return False
    if storages([found.x, found.weight]) & {stream.storage, *memory.written}:
        return False
    sharing = [n for n in memory.sharing[stream.storage] if not n._erased]
    return all(user <= found.root for n in sharing for user in (n, *n.users))


def _in_place(memory: _Memory, found: _Sum) -> None:
    root = found.root
    made, stream, weight = spec(root), spec(found.residual), spec(found.weight)
    assert made is not None and stream is not None and weight is not None
    size, inner = weight.shape
    target = insert(root, aten.view.default, (found.residual, [-1, size]), view=True)
    rows = insert(root, aten.view.default, (found.x, [-1, inner]), view=True)
    matrix = insert(root, aten.t.default, (found.weight,), view=True)
    total = insert(root, aten.addmm_.default, (target, rows, matrix), view=True)
    out = insert(root, aten.view.default, (total, list(made.shape)), view=True)
    for node in (target, rows, matrix, total, out):
        memory.add(node)
    root.replace_all_uses_with(out)
    root.graph.erase_node(root)
    root.graph.erase_node(found.product)
    memory.becomes(made.storage, stream.storage)
