"""Costs without a cost model: the same fixed rates for every device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from genie.srg.graph import Node


class NominalCost:
    """FLOPs and bytes at rates that no one measured. It ranks the parts of a graph by their work, so that
    stages and towers can be balanced, but says nothing of real seconds: with it, plans have no predicted
    time, links cost nothing, and whatever can be split is."""

    FLOPS_PER_S: ClassVar[float] = 100e9
    BYTES_PER_S: ClassVar[float] = 10e9

    def seconds(self, nodes: Sequence[Node], share: float = 1.0) -> list[float]:
        """The larger of both times of each node; views 0."""
        flops_s, bytes_s = share / self.FLOPS_PER_S, share / self.BYTES_PER_S
        return [max((n.cost.flops or 0) * flops_s, n.cost.nbytes * bytes_s) for n in nodes]
