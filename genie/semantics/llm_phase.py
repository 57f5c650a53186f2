"""Prefill and decode: how many tokens a language model's step puts through attention at once.

A step that grows a KV cache by one position is a decode, by more a prefill. Without a cache, a causal
pass over several tokens that ends in logits over the vocabulary of its token embedding is a prefill.
"""

from __future__ import annotations

from genie.semantics.kv_cache import Growth, growths
from genie.srg.cost import ATTENTIONS, COMPUTE
from genie.srg.graph import Graph, Node, Phase


def recognize(graph: Graph) -> None:
    steps = _steps(graph, growths(graph))
    if not steps and (seeds := _causal_language_model(graph)):
        steps = [(Phase.PREFILL, min(seeds), len(graph.nodes), seeds)]
    for phase, start, end, seeds in steps:
        _label(graph, phase, start, end, seeds)
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


def _label_preparation(graph: Graph) -> None:
    """Masks, positions and ids belong to the step that alone uses them; earlier arithmetic does not."""
    readers = graph.wiring.readers
    computed: set[int] = set()
    for node in graph.nodes:
        if node.name in COMPUTE or not computed.isdisjoint(node.inputs):
            computed.update(node.outputs)
    for node in reversed(graph.nodes):
        if node.phase is Phase.UNKNOWN and computed.isdisjoint(node.outputs):
            phases = {r.phase for v in node.outputs for r in readers[v]}
            if len(phases) == 1 and phases <= {Phase.PREFILL, Phase.DECODE}:
                node.phase = phases.pop()


def _causal_language_model(graph: Graph) -> set[int]:
    """The embeddings of a causal model with a vocabulary head; empty when it is something else."""
    spec = graph.wiring.spec
    if not any(_is_causal(graph, n) for n in graph.nodes if n.name in ATTENTIONS):
        return set()
    embeddings = [n for n in graph.nodes if n.name == "embedding"]
    tables = [table.shape[0] for n in embeddings if (table := spec[n.inputs[0]]) is not None]
    widths = {n.specs[0].shape[-1] for n in _last_computations(graph) if n.specs[0] and n.specs[0].shape}
    # The largest table is the vocabulary's; the others hold positions and the like.
    return {n.number for n in embeddings} if tables and max(tables) in widths else set()


def _last_computations(graph: Graph) -> list[Node]:
    """Those that no other one is computed from."""
    last: list[Node] = []
    used: set[int] = set()  # values that a later computation depends on
    for node in reversed(graph.nodes):
        computes = node.name in COMPUTE and bool(node.outputs)
        later = not used.isdisjoint(node.outputs)
        if computes and not later:
            last.append(node)
        if computes or later:
            used.update(node.inputs)
    return last


def _is_causal(graph: Graph, node: Node) -> bool:
    query = graph.wiring.spec[node.inputs[0]]
    flag = node.kwargs.get("is_causal", node.args[5] if len(node.args) > 5 else None)
    return flag == ["b", True] and query is not None and query.shape[-2] > 1
