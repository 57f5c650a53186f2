"""Convolution stages, and the phase of image encoders.

A stage ends where a convolution halves (or doubles) the height of its feature map: the classic places
to cut a CNN, because the map between stages is small. Everything between belongs to the stage that it
follows. A graph with one stage only (a patch embedding) has none worth naming.
"""

from __future__ import annotations

from genie.srg.cost import CONVOLUTIONS
from genie.srg.graph import Graph, Modality, Phase


def recognize(graph: Graph) -> None:
    if not any(node.name in CONVOLUTIONS for node in graph.nodes):
        return
    encoded: set[int] = set()
    stage_of: dict[int, tuple[int, int]] = {}  # value -> (stage, height of the stage's map)
    for node in graph.nodes:
        before = [stage_of[v] for v in node.inputs if v in stage_of]
        stage = max(before, default=None)
        spec = node.specs[0] if node.specs else None
        if node.name in CONVOLUTIONS and spec is not None and len(spec.shape) == 4:
            height = spec.shape[-2]
            if stage is None:
                stage = (0, height)
            elif 2 * height <= stage[1] or height >= 2 * stage[1]:
                stage = (stage[0] + 1, height)
            entry = True
        else:
            entry = any(v in encoded for v in node.inputs)
        if stage is not None:
            node.stage = stage[0]
            stage_of.update(dict.fromkeys(node.outputs, stage))
        if entry and node.modality is Modality.VISION:
            encoded.update(node.outputs)
            if node.phase is Phase.UNKNOWN:
                node.phase = Phase.VISION_ENCODE
    if not any(node.stage for node in graph.nodes):
        for node in graph.nodes:
            node.stage = None
