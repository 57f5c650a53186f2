"""Modality by entry op: an embedding of integers starts text, a convolution of 3 channels vision.

It flows forward to all that is computed from the entry; where two meet the result is multimodal. An
embedding may also be one of positions (CLIP's image tower has one): until the first op that does real
arithmetic it counts for less than vision that it is added to. Weights have none: they may serve both.
"""

from __future__ import annotations

from genie.srg.cost import COMPUTE, CONVOLUTIONS
from genie.srg.graph import Graph, Modality, Node, Residency

_NONE, _EMBEDDED, _TEXT, _VISION, _BOTH = 0, 1, 2, 4, 6
_NAMES = {_TEXT: Modality.TEXT, _VISION: Modality.VISION, _BOTH: Modality.MULTIMODAL}


def recognize(graph: Graph) -> None:
    flow: dict[int, int] = {n.outputs[0]: _NONE for n in graph.externals}
    state: list[int] = []
    for node in graph.nodes:
        kind = _NONE
        for value in node.inputs:
            kind |= flow[value]
        if kind == _NONE:
            kind = _entry(graph, node)
        if kind & _BOTH:
            kind &= _BOTH
        elif kind and node.name in COMPUTE:
            kind = _TEXT
        for value in (*node.outputs, *node.writes):
            flow[value] = kind
        state.append(kind)
    wiring = graph.wiring
    # Backwards: what an entry is computed from, and embeddings that were only positions.
    for node in (*reversed(graph.nodes), *graph.externals):
        kind = state[node.number] if node.number >= 0 else _NONE
        if kind in (_NONE, _EMBEDDED) and node.residency is not Residency.PERSISTENT_WEIGHT:
            readers = {state[r.number] for v in node.outputs for r in wiring.readers[v]} - {_NONE}
            if len(readers) == 1:
                kind = readers.pop()
            if kind == _EMBEDDED:
                kind = _TEXT
            if node.number >= 0:
                state[node.number] = kind
        if node.modality is Modality.UNKNOWN:
            node.modality = _NAMES.get(kind, Modality.UNKNOWN)


def _entry(graph: Graph, node: Node) -> int:
    specs = [graph.wiring.spec[v] for v in node.inputs[:2]]
    if len(specs) < 2 or specs[0] is None or specs[1] is None:
        return _NONE
    if node.name == "embedding":
        return _EMBEDDED if specs[1].dtype.startswith("int") else _NONE
    if node.name in CONVOLUTIONS and len(specs[1].shape) == 4 and specs[1].shape[1] == 3:
        return _VISION
    return _NONE
