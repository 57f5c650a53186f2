"""Persistent weights: uploaded Parameters, the running statistics of normalisation, and their views."""

from __future__ import annotations

from genie.srg.graph import Graph, Node, Origin, Residency

#: all take (input, weight?, bias?, running_mean?, running_var?, ...)
_NORMS = frozenset({
    "batch_norm", "native_batch_norm", "cudnn_batch_norm", "_native_batch_norm_legit",
    "_native_batch_norm_legit_no_training", "_batch_norm_impl_index", "instance_norm",
})  # fmt: skip


def recognize(graph: Graph) -> None:
    wiring = graph.wiring
    for node in graph.externals:
        if node.origin is Origin.PARAMETER:
            node.residency = Residency.PERSISTENT_WEIGHT
    places: dict[int, list[int]] = {}  # by the arguments that all nodes of one op definition share
    for node in graph.named(_NORMS):
        if id(node.args) not in places:
            places[id(node.args)] = _running_statistics(node)
        for place in places[id(node.args)]:
            source = wiring.producer[wiring.root[node.inputs[place]]]
            if source.origin is not None:
                source.residency = Residency.PERSISTENT_WEIGHT
    for node in wiring.views:
        source = wiring.producer[wiring.root[node.outputs[0]]]
        if source.residency is Residency.PERSISTENT_WEIGHT:
            node.residency = Residency.PERSISTENT_WEIGHT


def _running_statistics(node: Node) -> list[int]:
    """Their places among the inputs. Buffers, not Parameters: only their place among the arguments tells
    what they are."""
    present = [p[0] == "t" for p in node.args]
    return [sum(present[:k]) for k in (3, 4) if k < len(present) and present[k]]
