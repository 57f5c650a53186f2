"""Attention, fused or spelled out as matmul, softmax and matmul: who asks, and whether it is causal."""

from __future__ import annotations

from dataclasses import dataclass

from genie.srg.cost import ATTENTIONS, COMPUTE
from genie.srg.graph import Graph, Node

_SOFTMAX = frozenset({"softmax", "_softmax"})
_MATMULS = frozenset({"matmul", "bmm", "baddbmm"})
#: between the scores and their softmax, and between that and the values
_ON_SCORES = frozenset({
    "add", "add_", "sub", "mul", "mul_", "div", "div_", "masked_fill", "masked_fill_", "where", "_to_copy",
    "clone", "native_dropout", "dropout", "nan_to_num",
})  # fmt: skip
_COMPARISONS = frozenset({"le", "lt", "ge", "gt", "tril", "triu", "tril_", "triu_"})


@dataclass(frozen=True)
class Attention:
    """``node``: the fused op, or the softmax. ``queries``: positions that ask at once. ``masks``: values
    that are laid over the scores."""

    node: Node
    queries: int
    masks: tuple[int, ...]
    is_causal: bool  # by its flag; see `looks_back_only`


def attentions(graph: Graph) -> list[Attention]:
    """All whose sizes are known, in program order; found once for each graph."""
    found = graph.__dict__.get("attentions")
    if found is None:
        either = [
            _fused(graph, n) if n.name in ATTENTIONS else _spelled_out(graph, n)
            for n in graph.named(_SOFTMAX | ATTENTIONS)
        ]
        found = graph.__dict__["attentions"] = [a for a in either if a is not None]
    return found


def looks_back_only(graph: Graph, attention: Attention) -> bool:
    """No position sees a later one: by the op's flag, or by a mask that compares positions with positions.

    A learned bias is none, though its buckets come from such comparisons too.
    """
    if attention.queries < 2:
        return False
    if attention.is_causal:
        return True
    wiring = graph.wiring
    todo, seen = list(attention.masks), set(attention.masks)
    while todo:
        node = wiring.producer[todo.pop()]
        if node.name in _COMPARISONS and node.outputs:
            spec = node.specs[0]
            if spec is not None and len(spec.shape) >= 2 and min(spec.shape[-2:]) > 1:
                return True
        if node.name != "embedding" and node.name not in COMPUTE:
            fresh = [v for v in node.inputs if v not in seen]
            seen.update(fresh)
            todo += fresh
    return False


def _fused(graph: Graph, node: Node) -> Attention | None:
    query = graph.wiring.spec[node.inputs[0]]
    if query is None or len(query.shape) < 2:
        return None
    flag = node.kwargs.get("is_causal", node.args[5] if len(node.args) > 5 else None)
    return Attention(node, query.shape[-2], node.inputs[3:], flag == ["b", True])


def _spelled_out(graph: Graph, node: Node) -> Attention | None:
    spec = node.specs[0] if node.specs else None
    if spec is None or len(spec.shape) < 3 or not _weighs_values(graph, node):
        return None
    masks: list[int] = []
    at = graph.wiring.producer[node.inputs[0]]
    while at.name not in _MATMULS:
        if not (at.is_view or at.name in _ON_SCORES):
            return None
        k = 1 if at.name == "where" else 0
        masks += [v for j, v in enumerate(at.inputs) if j != k]
        at = graph.wiring.producer[at.inputs[k]]
    return Attention(node, spec.shape[-2], tuple(masks), False)


def _weighs_values(graph: Graph, node: Node) -> bool:
    todo = list(node.outputs)
    while todo:
        value = todo.pop()
        for reader in graph.wiring.readers[value]:
            if reader.name in _MATMULS and reader.inputs[0] == value:
                return True
            if reader.is_view or reader.name in _ON_SCORES:
                todo += reader.outputs
    return False
