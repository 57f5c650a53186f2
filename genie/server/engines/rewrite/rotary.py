"""Rotary embedding in two kernels instead of five.

``q * cos + cat([-q2, q1]) * sin``, for halves q1 and q2 of the last dimension, is for each pair of elements a
product with the matrix ``[[cos1, -sin1], [sin2, cos2]]``: one multiplication of the pairs with the matrix,
broadcast, and one sum of its two columns. Bit by bit the same, since the same products are rounded and then
added. The matrices take two kernels once a program; all layers, queries and keys share them.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

from torch import fx

from genie.server.engines.rewrite.facts import (
    argument,
    aten,
    erase_unread,
    insert,
    kept,
    overload,
    same_geometry,
    spec,
    storages,
    written_storages,
)


class _Rotation(NamedTuple):
    x: fx.Node
    cos: fx.Node
    sin: fx.Node
    inside: set[fx.Node]


def rotary(graph: fx.Graph) -> int:
    unstable, outputs = written_storages(graph), set(kept(graph))
    tables: dict[tuple[fx.Node, fx.Node], fx.Node] = {}
    changed = 0
    for root in list(graph.nodes):
        found = None if root._erased else _rotation(root)
        if found is None:
            continue
        inner = found.inside - {root}
        if storages([found.x, found.cos, found.sin, *found.inside]) & unstable:
            continue
        if any(n in outputs or set(n.users) - found.inside for n in inner):
            continue
        pair = (found.cos, found.sin)
        if pair not in tables:
            tables[pair] = _table(*pair)
        if _rotate(root, found.x, tables[pair]):
            erase_unread(inner)
            changed += 1
    return changed


def _rotation(root: fx.Node) -> _Rotation | None:
    if overload(root) is not aten.add.Tensor or len(root.args) != 2 or root.kwargs:
        return None
    for straight, crossed in (root.args, root.args[::-1]):
        for x, cos in _factors(straight):
            for turned, sin in _factors(crossed):
                halves = _turned(turned, x)
                specs = [spec(n) for n in (x, cos, sin, root)]
                if halves is None or any(s is None for s in specs):
                    continue
                sx, sc, ss, sr = specs
                assert sx is not None and sc is not None and ss is not None and sr is not None
                if (
                    sx.dtype == sc.dtype == ss.dtype
                    and sc.shape == ss.shape
                    and len(sc.shape) == len(sx.shape)
                    and sc.shape[-1] == sx.shape[-1]
                    and sr.shape == sx.shape
                ):
                    return _Rotation(x, cos, sin, {root, straight, crossed, turned, *halves})  # type: ignore[arg-type]
    return None


def _factors(value: Any) -> list[tuple[fx.Node, fx.Node]]:
    if overload(value) is not aten.mul.Tensor or not all(isinstance(a, fx.Node) for a in value.args):
        return []
    a, b = value.args
    return [(a, b), (b, a)]


def _turned(value: fx.Node, x: fx.Node) -> set[fx.Node] | None:
    """The calls that make ``cat([-x2, x1])`` of the halves of ``x``."""
    s = spec(x)
    if overload(value) is not aten.cat.default or s is None or not s.shape or s.shape[-1] % 2:
        return None
    parts: Any = value.args[0]
    if len(parts) != 2 or argument(value, "dim") not in (-1, len(s.shape) - 1):
        return None
    negative, first = parts
    if overload(negative) is not aten.neg.default:
        return None
    second = negative.args[0]
    if _is_half(first, x, 0) and _is_half(second, x, 1):
        return {negative, first, second}
    return None


def _is_half(value: Any, x: fx.Node, which: int) -> bool:
    s = spec(x)
    assert s is not None
    size, last = s.shape[-1], (-1, len(s.shape) - 1)
    if overload(value) is not aten.slice.Tensor or value.args[0] is not x:
        return False
    start, end = argument(value, "start") or 0, argument(value, "end")
    end = size if end is None else min(end, size)
    return (
        argument(value, "dim") in last
        and argument(value, "step") == 1
        and (start, end) == ((0, size // 2), (size // 2, size))[which]
    )


def _table(cos: fx.Node, sin: fx.Node) -> fx.Node:
    """[..., 2, 2, half], put in where both are known."""
    at = max(cos, sin).next
    while at.op == "placeholder":
        at = at.next
    s = spec(cos)
    assert s is not None
    half, size = s.shape[-1] // 2, s.shape[-1]

    def part(of: fx.Node, start: int) -> fx.Node:
        return insert(at, aten.slice.Tensor, (of, -1, start, start + half), view=True)

    negative = insert(at, aten.neg.default, (part(sin, 0),))
    rows = insert(at, aten.cat.default, ([part(cos, 0), negative, part(sin, half), part(cos, half)], -1))
    return insert(at, aten.view.default, (rows, [*s.shape[:-1], 2, 2, size // 2]), view=True)


def _rotate(root: fx.Node, x: fx.Node, table: fx.Node) -> bool:
    old, s = spec(root), spec(x)
    assert old is not None and s is not None
    made: list[fx.Node] = []

    def call(op: Any, *args: Any, view: bool = False) -> fx.Node:
        made.append(insert(root, op, args, view=view))
        return made[-1]

    try:
        pairs = call(aten.view.default, x, [*s.shape[:-1], 1, 2, s.shape[-1] // 2], view=True)
        products = call(aten.mul.Tensor, pairs, table)
        columns = [call(aten.select.int, products, -2, k, view=True) for k in (0, 1)]
        total = call(aten.add.Tensor, *columns)
        out = call(aten.view.default, total, list(s.shape), view=True)
    except RuntimeError:  # its layout has no such view
        out = None
    if out is None or not same_geometry(spec(out), old):
        erase_unread(made)
        return False
    total.meta["spec"] = replace(spec(total), storage=old.storage)  # type: ignore[type-var]
    out.meta["spec"] = old
    root.replace_all_uses_with(out)
    root.graph.erase_node(root)
    return True
