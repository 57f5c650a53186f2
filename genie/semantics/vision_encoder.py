"""Image encoders: all vision that is computed from a convolution, be it a CNN or a patch embedding."""

from __future__ import annotations

from genie.srg.cost import CONVOLUTIONS
from genie.srg.graph import Graph, Modality, Phase


def recognize(graph: Graph) -> None:
    convolutions = graph.named(CONVOLUTIONS)
    numbers = {n.number for n in convolutions}
    encoded: set[int] = set()
    for node in graph.nodes[convolutions[0].number :] if convolutions else ():
        if (
            node.modality is Modality.VISION
            and (node.number in numbers or not encoded.isdisjoint(node.inputs))
        ):  # fmt: skip
            encoded.update(node.outputs)
            if node.phase is Phase.UNKNOWN:
                node.phase = Phase.VISION_ENCODE
