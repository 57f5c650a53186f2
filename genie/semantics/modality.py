"""Modality by entry op: an embedding of integers in sequences is text, a convolution of 3 channels vision.

It flows forward to all that is computed from the entry; where two meet the result is multimodal. An
embedding may also be one of positions (CLIP's image tower has one): until the first op that does real
arithmetic it counts for less than vision that it is added to. Weights have none: they may serve both.
"""

from __future__ import annotations

from genie.srg.cost import COMPUTE, CONVOLUTIONS
from genie.srg.graph import Graph, Modality, Node, Residency

_ENTRIES = CONVOLUTIONS | {"embedding"}
_NONE, _EMBEDDED, _TEXT, _VISION, _BOTH = 0, 1, 2, 4, 6
_NAMES = {_TEXT: Modality.TEXT, _VISION: Modality.VISION, _BOTH: Modality.MULTIMODAL}


def recognize(graph: Graph) -> None:
    entries = {n.number: _entry(graph, n) for n in graph.named(_ENTRIES)}
    if not any(entries.values()):
        return
    arithmetic = {n.number for n in graph.named(COMPUTE)}
    flow: dict[int, int] = {}
    state: list[int] = []
    for node in graph.nodes:
        number, kind = node.number, _NONE
        for value in node.inputs:
            if value in flow:
                kind |= flow[value]
        if kind == _NONE:
            kind = entries.get(number, _NONE)
        if kind & _BOTH:
            kind &= _BOTH
        elif kind and number in arithmetic:
            kind = _TEXT
        if kind:
            for value in node.outputs:
                flow[value] = kind
        for value in node.writes:
            flow[value] = kind
        state.append(kind)
    readers = graph.wiring.readers
    # Backwards: what an entry is computed from, and embeddings that were only positions.
    for node in (*reversed(graph.nodes), *graph.externals):
        number = node.number
        kind = state[number] if number >= 0 else _NONE
        if kind <= _EMBEDDED and node.residency is not Residency.PERSISTENT_WEIGHT:
            kinds = {state[r.number] for v in node.outputs for r in readers[v]}
            kinds.discard(_NONE)
            if len(kinds) == 1:
                kind = kinds.pop()
            if kind == _EMBEDDED:
                kind = _TEXT
            if number >= 0:
                state[number] = kind
        if kind and node.modality is Modality.UNKNOWN:
            node.modality = _NAMES[kind]


def _entry(graph: Graph, node: Node) -> int:
    specs = [graph.wiring.spec[v] for v in node.inputs[:2]]
    if len(specs) < 2 or specs[0] is None or specs[1] is None:
        return _NONE
    if node.name == "embedding":
        return _EMBEDDED if specs[1].dtype.startswith("int") and len(specs[1].shape) > 1 else _NONE
    return _VISION if len(specs[1].shape) == 4 and specs[1].shape[1] == 3 else _NONE
