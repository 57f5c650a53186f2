"""Text encoders (BERT, the encoder of T5, CLIP's text tower): attention over a whole text, with nothing
to generate from it. Comes after what tells prefill and decode."""

from __future__ import annotations

from genie.semantics.attention import attentions
from genie.srg.graph import Graph, Modality, Phase, Residency


def recognize(graph: Graph) -> None:
    if any(
        a.queries > 1 and a.node.phase is Phase.UNKNOWN and a.node.modality is Modality.TEXT
        for a in attentions(graph)
    ):
        for node in graph.nodes:
            if (
                node.phase is Phase.UNKNOWN
                and node.modality is Modality.TEXT
                and node.residency is not Residency.PERSISTENT_WEIGHT
            ):
                node.phase = Phase.TEXT_ENCODE
