"""Computes once what is computed twice: the same op on the same values.

Not of values that are written to, and not where both results outlive the program: what keeps them may write
to one of the two later.
"""

from __future__ import annotations

from typing import Any

from torch import fx

from genie.server.engines.rewrite.copies import renumber
from genie.server.engines.rewrite.facts import is_pure, kept, same_geometry, spec, storages, written_storages


def duplicates(graph: fx.Graph) -> int:
    changed = 0
    unstable = written_storages(graph)
    first: dict[Any, fx.Node] = {}
    for node in list(graph.nodes):
        if node.op != "call_function" or not is_pure(node):
            continue
        touched = storages([node, *node.users, *node.all_input_nodes])
        if touched & unstable:
            continue
        key = (node.target, _key(node.args), _key(node.kwargs))
        before = first.setdefault(key, node)
        if before is node or not _mergeable(graph, before, node):
            continue
        old, new = spec(node), spec(before)
        if old is not None and new is not None and old.storage != new.storage:
            renumber(graph, old.storage, new.storage)
        node.replace_all_uses_with(before)
        graph.erase_node(node)
        changed += 1
    return changed


def _mergeable(graph: fx.Graph, a: fx.Node, b: fx.Node) -> bool:
    if not same_geometry(spec(a), spec(b)):
        return False
    outputs = kept(graph)
    if a in outputs and b in outputs:
        return False
    lasting = storages(outputs)
    mine, other = _memory(a), _memory(b)
    return not ((mine - other) & lasting and (other - mine) & lasting)


def _memory(node: fx.Node) -> set[int]:
    return storages([node]) if spec(node) is not None else storages(node.users)


def _key(value: Any) -> Any:
    """Hashable; tells 1, 1.0 and True apart."""
    if isinstance(value, fx.Node):
        return value
    if isinstance(value, (list, tuple)):
        return type(value).__name__, tuple(_key(v) for v in value)
    if isinstance(value, dict):
        return tuple(sorted((k, _key(v)) for k, v in value.items()))
    return type(value), repr(value) if isinstance(value, float) else value
