"""What is to be planned, and what a policy is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

from genie.scheduler.cluster import Cluster
from genie.scheduler.plan import BatchAxes, Declined, Placement
from genie.scheduler.where import Where
from genie.srg.graph import Graph


@dataclass
class Problem:
    """``graph``: the annotated window. ``where``: of each external by value number (-(k+1)).

    ``alias``: externals that share memory with another have the same number here (others are absent).
    ``names``: for each external that is a weight its digest-independent name, where known.
    ``calls``: first instruction of each program in the window: a module that was called again (compiled)
    is a program of its own. ``may_split_batch``: False while layouts have not been checked on a server.
    ``prove_batch``: for externals (value numbers) whose dimension 0 is the batch, the axes of all values, or
    a text that says why there is no proof.
    """

    graph: Graph
    cluster: Cluster
    where: Mapping[int, Where]
    alias: Mapping[int, int] = field(default_factory=dict)
    calls: Sequence[int] = (0,)
    may_split_batch: bool = True
    prove_batch: Callable[[Graph, Sequence[int]], BatchAxes | str] | None = None

    @cached_property
    def seconds(self) -> list[list[float]]:
        """Predicted seconds of each instruction on each device: ``seconds[device][instruction]``."""
        return [d.cost.seconds(self.graph.nodes) for d in self.cluster.devices]


class Policy(Protocol):
    """Proposes placements of a window. Pure: it changes nothing, and the same problem gives the same
    proposals. A built-in policy belongs to a feature that can be switched off."""

    @property
    def name(self) -> str: ...

    def propose(self, problem: Problem) -> Sequence[Placement | Declined]:
        """Its proposals, best first, and the reasons for what it does not propose."""
