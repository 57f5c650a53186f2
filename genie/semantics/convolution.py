"""Convolution stages.

A stage ends where a convolution halves (or doubles) the height of its feature map: the classic places
to cut a CNN, because the map between stages is small. Everything between belongs to the stage that it
follows. A graph with one stage only (a patch embedding) has none worth naming.
"""

from __future__ import annotations

from genie.srg.cost import CONVOLUTIONS
from genie.srg.graph import Graph


def recognize(graph: Graph) -> None:
    convolutions = graph.named(CONVOLUTIONS)
    if not convolutions:
        return
    numbers = {n.number for n in convolutions}
    stage_of: dict[int, tuple[int, int]] = {}  # value -> (stage, height of the stage's map)
    for node in graph.nodes[convolutions[0].number :]:
        stage: tuple[int, int] | None = None
        for v in node.inputs:
            before = stage_of.get(v)
            if before is not None and (stage is None or before > stage):
                stage = before
        spec = node.specs[0] if node.number in numbers and node.specs else None
        if spec is not None and len(spec.shape) == 4:
            height = spec.shape[-2]
            if stage is None:
                stage = (0, height)
            elif 2 * height <= stage[1] or height >= 2 * stage[1]:
                stage = (stage[0] + 1, height)
        if stage is not None:
            node.stage = stage[0]
            for v in node.outputs:
                stage_of[v] = stage
    if not any(node.stage for node in graph.nodes):
        for node in graph.nodes:
            node.stage = None
