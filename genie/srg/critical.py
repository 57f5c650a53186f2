"""The critical path: the longest chain of instructions that wait for each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from genie.srg.graph import Graph, Node


@dataclass(frozen=True)
class NominalRates:
    """A roofline without calibration, for comparing the parts of one graph: a `CostModel` of no device.

    An op takes the longer of its FLOPs and its bytes at these rates (about those of one CPU core), and
    ``launch_s`` besides; views take nothing. ``share``: of the FLOPs and bytes.
    """

    flops_per_s: float = 1e11
    bytes_per_s: float = 1e10
    launch_s: float = 1e-6

    def seconds(self, nodes: Sequence[Node], share: float = 1.0) -> list[float]:
        flops, moved, launch = share / self.flops_per_s, share / self.bytes_per_s, self.launch_s
        return [
            0.0 if n.is_view else max((n.cost.flops or 0) * flops, n.cost.nbytes * moved) + launch
            for n in nodes
        ]


NOMINAL = NominalRates()


def critical_path(graph: Graph, seconds: Sequence[float]) -> tuple[list[int], float]:
    """The instructions on it, in program order, and how long they take in seconds.

    ``seconds``: of each instruction. Externals are there from the start. Raises ValueError when their
    number is not that of the instructions.
    """
    if len(seconds) != len(graph.nodes):
        raise ValueError(f"{len(seconds)} times for {len(graph.nodes)} instructions: give one for each")
    starts = [0.0] * len(seconds)
    waits_for = [-1] * len(seconds)
    for edge in graph.edges:  # in order of their targets, so a source's start is known by now
        source = edge.source
        if source >= 0:
            end = starts[source] + seconds[source]
            target = edge.target
            if end > starts[target] or waits_for[target] < 0:
                starts[target], waits_for[target] = end, source
    ends = [a + b for a, b in zip(starts, seconds, strict=True)]
    if not ends:
        return [], 0.0
    length = max(ends)
    at, path = ends.index(length), []
    while at >= 0:
        path.append(at)
        at = waits_for[at]
    return path[::-1], length
