"""Residency of all that is neither weight nor KV cache, from its lifetime alone."""

from __future__ import annotations

from genie.srg.graph import Graph, Residency


def recognize(graph: Graph) -> None:
    """What dies inside the program is an ephemeral activation; the rest enters or leaves it."""
    wiring = graph.wiring
    for node in graph.externals:
        if node.residency is Residency.UNKNOWN:
            node.residency = Residency.EXTERNAL_INPUT
    for node in graph.nodes:
        if node.residency is not Residency.UNKNOWN:
            continue
        if node.leaves:
            node.residency = Residency.EXTERNAL_OUTPUT
        elif node.outputs:
            node.residency = Residency.EPHEMERAL_ACTIVATION
        elif node.writes:
            node.residency = wiring.producer[wiring.root[node.writes[0]]].residency
