"""Runs the recognizers over a graph."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy

from genie.semantics import (
    branches,
    convolution,
    hints,
    kv_cache,
    llm_phase,
    modality,
    modules,
    residency,
    text_encoder,
    vision_encoder,
    weights,
)
from genie.semantics.protocol import Recognizer
from genie.srg.graph import Graph

#: strongest evidence first, because the first to fill something in wins; some read what others filled in.
#: Only what the user says, at the end, overrules.
RECOGNIZERS: tuple[Recognizer, ...] = (
    weights.recognize,
    kv_cache.recognize,
    modality.recognize,
    convolution.recognize,
    llm_phase.recognize,
    vision_encoder.recognize,
    text_encoder.recognize,
    residency.recognize,
    modules.recognize,
    branches.recognize,
    hints.recognize,
)


def annotate(graph: Graph, recognizers: Sequence[Recognizer] = RECOGNIZERS) -> Graph:
    """A copy of ``graph`` with what the recognizers found; ``graph`` stays as it was."""
    nodes = [copy(n) for n in graph.externals], [copy(n) for n in graph.nodes]
    return annotate_in_place(Graph(*nodes, graph.digest, graph.blocks, list(graph.notes)), recognizers)


def annotate_in_place(graph: Graph, recognizers: Sequence[Recognizer] = RECOGNIZERS) -> Graph:
    """``graph`` itself, with what the recognizers found."""
    for recognize in recognizers:
        recognize(graph)
    return graph
