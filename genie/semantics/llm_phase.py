"""Prefill and decode: how many tokens a language model's step puts through attention at once.

A step that grows a KV cache by one position is a decode, by more a prefill. So is filling the cache of
a cross-attention with an encoded text, though one token asks. Without a cache, a causal pass over several
tokens that ends in logits over the vocabulary of its token embedding is a prefill.
"""

from __future__ import annotations

from genie.semantics.attention import attentions, looks_back_only
from genie.semantics.kv_cache import Growth, growths
from genie.srg.cost import COMPUTE
from genie.srg.graph import Graph, Node, Phase


def recognize(graph: Graph) -> None:
    found = growths(graph)
    steps = _steps(graph, found)
    if not steps and (seeds := _causal_language_model(graph)):
        steps = [(Phase.PREFILL, min(seeds), len(graph.nodes), seeds)]
    for phase, start, end, seeds in steps:
        _label(graph, phase, start, end, seeds)
    for growth in found:
        _label_filling(graph, growth)
    if steps:
        _label_preparation(graph)


def _steps(graph: Graph, found: list[Growth]) -> list[tuple[Phase, int, int, set[int]]]:
    """(phase, first instruction, end, seeds) for each run of growths by equally many tokens."""
    steps: list[tuple[Phase, int, int, set[int]]] = []
    queries, last_number = None, -1
    for growth in found:
        if growth.queries != queries:
            phase = Phase.DECODE if growth.queries == 1 else Phase.PREFILL
            seeds = _slice_back(graph, growth.new, last_number + 1) | {growth.node.number}
            start = min(seeds)
            if steps:
                steps[-1] = (*steps[-1][:2], start, steps[-1][3])
            steps.append((phase, start, len(graph.nodes), seeds))
        queries, last_number = growth.queries, growth.node.number
    return steps


def _slice_back(graph: Graph, value: int, floor: int) -> set[int]:
    """Instructions from ``floor`` on that ``value`` is computed from, back to the token embedding."""
    producer = graph.wiring.producer
    found: set[int] = set()
    todo = [value]
    while todo:
        node = producer[todo.pop()]
        if node.number >= floor and node.number not in found:
            found.add(node.number)
            if node.name != "embedding":
                todo += node.inputs
    return found


def _label(graph: Graph, phase: Phase, start: int, end: int, seeds: set[int]) -> None:
    """All that is computed from the seeds before the next step begins."""
    reached: set[int] = set()
    for node in graph.nodes[start:end]:
        if node.number in seeds or not reached.isdisjoint(node.inputs):
            reached.update(node.outputs)
            if node.phase is Phase.UNKNOWN:
                node.phase = phase


def _label_filling(graph: Graph, growth: Growth) -> None:
    """A cache that is filled with more positions than ask: back to the projection of what is encoded."""
    new = graph.wiring.spec[growth.new]
    if new is None or new.shape[growth.dim] <= growth.queries:
        return
    node, value = growth.node, growth.new
    while node.phase is Phase.UNKNOWN and node.number >= 0:
        node.phase = Phase.PREFILL
        if node.name in COMPUTE:
            return
        node = graph.wiring.producer[value]
        value = node.inputs[0] if node.inputs else value


def _label_preparation(graph: Graph) -> None:
    """Masks, positions and ids belong to the step that alone uses them; earlier arithmetic does not."""
    readers = graph.wiring.readers
    computed: set[int] = set()
    arithmetic = {n.number for n in graph.named(COMPUTE)}
    for node in graph.nodes:
        if node.number in arithmetic or not computed.isdisjoint(node.inputs):
            computed.update(node.outputs)
    for node in reversed(graph.nodes):
        if node.phase is Phase.UNKNOWN and computed.isdisjoint(node.outputs):
            phases = {r.phase for v in node.outputs for r in readers[v]}
            if len(phases) == 1 and phases <= {Phase.PREFILL, Phase.DECODE}:
                node.phase = phases.pop()


def _causal_language_model(graph: Graph) -> set[int]:
    """The embeddings that a causal model with a vocabulary head begins with; empty when it is another."""
    spec = graph.wiring.spec
    first = next((a for a in attentions(graph) if looks_back_only(graph, a)), None)
    if first is None:
        return set()
    embeddings = graph.named(("embedding",))
    tables = [table.shape[0] for n in embeddings if (table := spec[n.inputs[0]]) is not None]
    widths = {n.specs[0].shape[-1] for n in _last_computations(graph) if n.specs[0] and n.specs[0].shape}
    # The largest table is the vocabulary's; the others hold positions and the like.
    if not tables or max(tables) not in widths:
        return set()
    # Those of an encoder beside it are not asked by its first attention.
    asked = _slice_back(graph, first.node.inputs[0], 0)
    return {n.number for n in embeddings if n.number in asked}


def _last_computations(graph: Graph) -> list[Node]:
    """Those that no other one is computed from."""
    last: list[Node] = []
    used: set[int] = set()  # values that a later computation depends on
    arithmetic = {n.number for n in graph.named(COMPUTE)}
    for node in reversed(graph.nodes):
        computes = node.number in arithmetic and bool(node.outputs)
        later = not used.isdisjoint(node.outputs)
        if computes and not later:
            last.append(node)
        if computes or later:
            used.update(node.inputs)
    return last
