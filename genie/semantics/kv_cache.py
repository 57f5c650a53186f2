"""KV caches: state that each step makes longer by the keys or values of its tokens.

Two forms: a *dynamic* cache is concatenated with the new slice and the result is kept; a *static* one
is written to in place, by ``index_copy_``, ``index_put_`` or a copy into a slice. Either way the cache
must outlive the program and be read by attention: histories of other kinds are not KV caches. Where a step
grows one, what earlier programs have left for its attention to read is one too: the keys and values of an
encoded text.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from genie.srg.cost import ATTENTIONS
from genie.srg.graph import Graph, Node, Origin, Residency, numel
from genie.wire.messages import TensorSpec

_READERS = ATTENTIONS | {"matmul", "bmm", "baddbmm"}
_LAYOUT_ONLY = frozenset({"clone", "_to_copy", "contiguous", "_unsafe_view", "repeat_interleave"})
#: beam search picks rows of the old cache; the rest are copies
_SELECTIONS = _LAYOUT_ONLY | {"index_select"}
_GROWERS = frozenset({"cat", "index_copy_", "index_put_", "_index_put_impl_", "copy_"})
_FACTORIES = frozenset({"zeros", "empty", "full", "zeros_like", "empty_like", "new_zeros", "empty_strided"})


@dataclass(frozen=True)
class Growth:
    """``node`` adds the positions of ``new`` to ``cache`` along ``dim`` (counted from 0).

    ``queries``: how many tokens the step processes. That is the length of ``new``, or fewer: the cache
    of a cross-attention is filled with a whole encoded sequence while one token asks.
    """

    node: Node
    cache: int
    new: int
    dim: int
    queries: int


def growths(graph: Graph) -> list[Growth]:
    """All of them, in program order; found once for each graph."""
    if "growths" not in graph.__dict__:
        graph.__dict__["growths"] = _find(graph)
    return graph.__dict__["growths"]


def _find(graph: Graph) -> list[Growth]:
    found: list[Growth] = []
    grown: set[int] = set()  # results of growths in this program: the cache of the next one
    for node in graph.named(_GROWERS):
        if node.name == "cat":
            growth = _concatenated(graph, node, grown)
        else:
            growth = _written(graph, node) if node.writes else None
        reader = None if growth is None else _attention(graph, growth)
        if growth is not None and reader is not None:
            query = graph.wiring.spec[reader.inputs[0]]
            asked = growth.queries if query is None or len(query.shape) < 2 else query.shape[-2]
            found.append(replace(growth, queries=min(growth.queries, asked)))
            grown.update(node.outputs)
    kept: list[Growth] = []
    continued: set[int] = set()
    for growth in reversed(found):
        if growth.node.writes or _survives(graph, growth) or not continued.isdisjoint(growth.node.outputs):
            continued.add(growth.cache)
            kept.append(growth)
    return kept[::-1]


def recognize(graph: Graph) -> None:
    wiring = graph.wiring
    for source in _read_only(graph):
        source.residency = Residency.STATEFUL_KV_CACHE
    for growth in growths(graph):
        for node in (growth.node, *_selections(graph, growth)):
            node.residency = Residency.STATEFUL_KV_CACHE
        source = wiring.producer[_origin(graph, growth.cache)]
        if source.residency is Residency.UNKNOWN:
            source.residency = Residency.STATEFUL_KV_CACHE
    if growths(graph):
        for node in wiring.views:
            if (
                node.residency is Residency.UNKNOWN
                and wiring.producer[wiring.root[node.outputs[0]]].residency is Residency.STATEFUL_KV_CACHE
            ):
                node.residency = Residency.STATEFUL_KV_CACHE


def _read_only(graph: Graph) -> list[Node]:
    """Caches that a step reads whole and leaves alone: those of a decoder's attention to its encoder."""
    found = []
    for node in graph.named(_READERS) if growths(graph) else ():
        for value in node.inputs[1:3]:
            source = graph.wiring.producer[_origin(graph, value)]
            if source.origin is Origin.EARLIER and not source.owners and _looks_cached(source.specs[0]):
                found.append(source)
    return found


def query_length_at(graph: Graph) -> tuple[int, int, int] | None:
    """Where a program of this template states how many tokens it processes: (instruction, new output
    among the instruction's own, dimension). None when it grows no cache, or the new slice is given."""
    for growth in growths(graph)[:1]:
        maker = graph.wiring.producer[growth.new]
        if maker.number >= 0:
            return maker.number, maker.outputs.index(growth.new), growth.dim
    return None


def _concatenated(graph: Graph, node: Node, grown: set[int]) -> Growth | None:
    if len(node.inputs) != 2 or not node.specs:  # with out= the result is one of the inputs
        return None
    (cache, new), spec = node.inputs, node.specs[0]
    new_spec = graph.wiring.spec[new]
    if not _looks_cached(spec) or new_spec is None or spec is None or len(new_spec.shape) != len(spec.shape):
        return None
    dim = (node.literals[0] if node.literals else 0) % len(spec.shape)
    if cache not in grown and not _is_state(graph, cache):
        return None
    return Growth(node, cache, new, dim, new_spec.shape[dim])


def _written(graph: Graph, node: Node) -> Growth | None:
    wiring = graph.wiring
    target, new = node.inputs[0], node.inputs[-1]
    spec, new_spec = wiring.spec[target], wiring.spec[new]
    root = wiring.root[target]
    root_spec = wiring.spec[root]
    if not _looks_cached(root_spec) or spec is None or new_spec is None:
        return None
    if not _is_state(graph, root, written=True):
        return None
    if node.name == "index_copy_":
        dim = node.literals[0] % len(spec.shape)
        return Growth(node, target, new, dim, new_spec.shape[dim])
    if node.name == "copy_":
        assert root_spec is not None
        if len(spec.shape) != len(root_spec.shape):
            return None
        shorter = [d for d, (a, b) in enumerate(zip(spec.shape, root_spec.shape, strict=True)) if a != b]
        return Growth(node, target, new, shorter[0], spec.shape[shorter[0]]) if len(shorter) == 1 else None
    kind, indexed = node.args[1]
    present = indexed if kind == "ol" else [1] * indexed
    index = wiring.spec[node.inputs[1]]
    if sum(present) != 1 or index is None or len(new_spec.shape) != len(spec.shape):
        return None
    return Growth(node, target, new, present.index(1), numel(index))


def _looks_cached(spec: TensorSpec | None) -> bool:
    """Floating point, and at least (heads or batch, positions, width)."""
    return spec is not None and len(spec.shape) >= 3 and "float" in spec.dtype


def _origin(graph: Graph, value: int) -> int:
    """The value that ``value`` is a view or a selection of, as far back as that goes."""
    wiring = graph.wiring
    while True:
        value = wiring.root[value]
        node = wiring.producer[value]
        if node.name not in _SELECTIONS:
            return value
        value = node.inputs[0]


def _is_state(graph: Graph, value: int, written: bool = False) -> bool:
    """Kept by an earlier program, a buffer that is written to, or a new cache: empty, or allocated here
    and kept."""
    source = graph.wiring.producer[_origin(graph, value)]
    if source.origin is Origin.HOST:
        if written and source.owners:
            return True
        return source.specs[0] is not None and 0 in source.specs[0].shape
    return source.origin is Origin.EARLIER or (source.name in _FACTORIES and source.leaves)


def _selections(graph: Graph, growth: Growth) -> list[Node]:
    """The copies of the grown cache with other rows in front, as beam search keeps them."""
    readers = graph.wiring.readers
    return [r for v in growth.node.outputs for r in readers[v] if r.name == "index_select"]


def _survives(graph: Graph, growth: Growth) -> bool:
    return any(n.leaves for n in (growth.node, *_selections(graph, growth)))


def _attention(graph: Graph, growth: Growth) -> Node | None:
    """The attention that reads the grown cache, through nothing but views and copies."""
    wiring = graph.wiring
    todo = list(growth.node.outputs) or [wiring.root[growth.cache]]
    seen = set(todo)
    while todo:
        for reader in wiring.readers[todo.pop()]:
            if reader.number <= growth.node.number and not reader.is_view:
                continue
            if reader.name in _READERS:
                return reader
            if reader.is_view or reader.name in _LAYOUT_ONLY:
                fresh = [v for v in reader.outputs if v not in seen]
                seen.update(fresh)
                todo += fresh
    return None
