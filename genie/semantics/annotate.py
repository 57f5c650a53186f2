"""Runs the recognizers over a graph."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy

from genie.semantics import convolution, kv_cache, llm_phase, modality, residency, weights
from genie.semantics.protocol import Recognizer
from genie.srg.graph import Graph

#: strongest evidence first, because the first to fill something in wins; some read what others filled in
RECOGNIZERS: tuple[Recognizer, ...] = (
    weights.recognize,
    kv_cache.recognize,
    modality.recognize,
    convolution.recognize,
    llm_phase.recognize,
    residency.recognize,
)


def annotate(graph: Graph, recognizers: Sequence[Recognizer] = RECOGNIZERS) -> Graph:
    """A copy of ``graph`` with what the recognizers found; ``graph`` stays as it was."""
    annotated = Graph(
        [copy(n) for n in graph.externals], [copy(n) for n in graph.nodes], graph.edges, graph.digest
    )
    for recognize in recognizers:
        recognize(annotated)
    return annotated
