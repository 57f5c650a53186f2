"""Branches: parts of a graph that compute side by side and share nothing that was computed.

Towers of one model (the image and the text of CLIP) and elements of a stream (micro-batches through one
CNN) are the same to this recognizer: towers begin at a matmul, convolution or attention that no
other is upstream of. What they read in common (weights, inputs, and cheap preparation such as masks)
does not join them. What joins two is an instruction that reads from both, or memory that one writes to and
the other reads or writes. Then:

- Two towers are *fused* if both are worth running side by side: at least two of those ops in each, and
  a tenth of the longer one's time. The instruction that fuses them, and all that follows it, is no
  branch's. Else they are one tower from there on: the projections of queries, keys and values.
- At the end the branches are all such towers, if there are at least two and they take half of the
  graph's time (at nominal rates). Else there are none.

`Node.branch` is numbered from 0 in order of first instruction. Preparation that only one branch reads is part
of it; what several read is None, and so are fusion and what follows it. Branches draw random numbers from
one generator all the same: dropout on two servers is not that of one.
"""

from __future__ import annotations

from genie.srg.cost import COMPUTE
from genie.srg.critical import NOMINAL
from genie.srg.graph import Graph

_LEAST_OPS = 2
_LEAST_OF_LONGEST = 0.1
_LEAST_OF_GRAPH = 0.5
_FUSED = -1


class _Towers:
    """Disjoint sets of instructions, with the ops of real arithmetic and the seconds in each."""

    def __init__(self) -> None:
        self.parent: list[int] = []
        self.ops: list[int] = []
        self.seconds: list[float] = []

    def begin(self) -> int:
        self.parent.append(len(self.parent))
        self.ops.append(0)
        self.seconds.append(0.0)
        return len(self.parent) - 1

    def find(self, tower: int) -> int:
        parent = self.parent
        while parent[tower] != tower:
            parent[tower] = parent[parent[tower]]
            tower = parent[tower]
        return tower

    def join(self, towers: set[int]) -> int:
        """Of several that meet: one tower, or _FUSED when two of them are worth running side by side."""
        if len(self.worthwhile(towers)) > 1:
            return _FUSED
        first, *others = towers
        for other in others:
            self.parent[other] = first
            self.ops[first] += self.ops[other]
            self.seconds[first] += self.seconds[other]
        return first

    def worthwhile(self, towers: set[int]) -> list[int]:
        enough = [t for t in towers if self.ops[t] >= _LEAST_OPS]
        longest = max((self.seconds[t] for t in enough), default=0.0)
        return [t for t in enough if self.seconds[t] >= _LEAST_OF_LONGEST * longest]


def recognize(graph: Graph) -> None:
    arithmetic = {n.number for n in graph.named(COMPUTE)}
    if len(arithmetic) < 2 * _LEAST_OPS:
        return
    seconds = NOMINAL.seconds(graph.nodes)
    towers, member = _towers(graph, seconds, arithmetic)
    branches = towers.worthwhile({towers.find(t) for t in range(len(towers.parent))})
    if len(branches) < 2 or sum(towers.seconds[t] for t in branches) < _LEAST_OF_GRAPH * sum(seconds):
        return
    chosen = set(branches)
    found = [t if t is None or t == _FUSED else towers.find(t) for t in member]
    found = [t if t in chosen else None for t in found]
    _prepare(graph, member, found)
    number: dict[int, int] = {}
    for node, tower in zip(graph.nodes, found, strict=True):
        if tower is not None:
            node.branch = number.setdefault(tower, len(number))


def _towers(graph: Graph, seconds: list[float], arithmetic: set[int]) -> tuple[_Towers, list[int | None]]:
    """The tower of each instruction: None upstream of all of them, _FUSED downstream of a fusion."""
    towers = _Towers()
    find = towers.find
    root = graph.wiring.root
    shared = {root[v] for node in graph.nodes for v in node.writes}
    of_value: dict[int, int] = {}
    wrote: dict[int, int] = {}  # storage that is written to -> tower of its last writer
    readers: dict[int, set[int]] = {}  # ... -> towers that have read it
    member: list[int | None] = []
    for number, node in enumerate(graph.nodes):
        tower: int | None = None
        met: set[int] = set()  # where there are several
        for v in node.inputs:
            other = of_value.get(v)
            if other is not None and other != tower:
                if tower is not None:
                    met |= {tower, other}
                tower = other
        touched = [root[v] for v in node.inputs if root[v] in shared] if shared else ()
        if touched or node.writes:
            met |= {wrote[storage] for storage in touched if storage in wrote}
            for v in node.writes:
                met |= readers.get(root[v], set())
            if tower is not None:
                met.add(tower)
            elif met:
                tower = next(iter(met))
        if _FUSED in met:
            tower = _FUSED
        elif len(met) > 1:
            tower = towers.join({find(t) for t in met})
        elif tower is None:
            tower = towers.begin() if number in arithmetic else None
        elif tower != _FUSED:
            tower = find(tower)
        member.append(tower)
        if tower is None:
            continue
        if tower != _FUSED:
            towers.ops[tower] += number in arithmetic
            towers.seconds[tower] += seconds[number]
        for v in node.outputs:
            of_value[v] = tower
        for storage in touched:
            readers.setdefault(storage, set()).add(tower)
        for v in node.writes:
            wrote[root[v]] = tower
    return towers, member


def _prepare(graph: Graph, member: list[int | None], found: list[int | None]) -> None:
    """Adds to each branch what nothing but the branch reads of the preparation."""
    readers = graph.wiring.readers
    for node in reversed(graph.nodes):
        if member[node.number] is None:
            values = (*node.outputs, *node.writes)
            by = {found[r.number] for v in values for r in readers[v] if r.number > node.number}
            found[node.number] = by.pop() if len(by) == 1 else None
