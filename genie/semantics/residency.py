"""Residency of all that is neither weight nor KV cache: buffers, and the rest by lifetime alone."""

from __future__ import annotations

from genie.srg.graph import Graph, Residency


def recognize(graph: Graph) -> None:
    """What dies inside the program is an ephemeral activation; the rest enters or leaves it."""
    wiring = graph.wiring
    for node in graph.externals:
        if node.residency is Residency.UNKNOWN:
            # A buffer that is no cache is as persistent as the weights beside it.
            node.residency = Residency.PERSISTENT_WEIGHT if node.owners else Residency.EXTERNAL_INPUT
    for node in graph.nodes:
        if node.residency is not Residency.UNKNOWN:
            continue
        if node.leaves:
            node.residency = Residency.EXTERNAL_OUTPUT
        elif node.outputs:
            node.residency = Residency.EPHEMERAL_ACTIVATION
        elif node.writes:
            node.residency = wiring.producer[wiring.root[node.writes[0]]].residency
