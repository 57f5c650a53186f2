"""What is to be planned, and what a policy is."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

from genie.scheduler.cluster import Cluster
from genie.scheduler.flow import Flow
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
    a text that says why there is no proof. ``turn``: how many calls there were before this window.
    ``movable``: externals with whose memory no other live handle has a part; only these may be written on
    another server than theirs, which then has them.
    """

    graph: Graph
    cluster: Cluster
    where: Mapping[int, Where]
    alias: Mapping[int, int] = field(default_factory=dict)
    calls: Sequence[int] = (0,)
    may_split_batch: bool = True
    prove_batch: Callable[[Graph, Sequence[int]], BatchAxes | str] | None = None
    turn: int = 0
    movable: Collection[int] = frozenset()
    valid: list[Placement] = field(default_factory=list, init=False, repr=False)  # that passed `validate`
    _shares: dict[tuple[int, float], list[float]] = field(default_factory=dict, repr=False)

    @cached_property
    def seconds(self) -> list[list[float]]:
        """Predicted seconds of each instruction on each device: ``seconds[device][instruction]``."""
        return [self.seconds_of_share(d.index, 1.0) for d in self.cluster.devices]

    def seconds_of_share(self, device: int, share: float) -> list[float]:
        """Of each instruction, with ``share`` of its batch. Asked once of each cost model and share."""
        cost = self.cluster.devices[device].cost
        key = (id(cost), share)
        if key not in self._shares:
            self._shares[key] = cost.seconds(self.graph.nodes, share)
        return self._shares[key]

    @cached_property
    def flow(self) -> Flow:
        """What policies, validation and transfers ask of the graph again and again."""
        return Flow(self.graph)


class Policy(Protocol):
    """Proposes placements of a window. Pure: it changes nothing, and the same problem gives the same
    proposals. A built-in policy belongs to a feature that can be switched off."""

    @property
    def name(self) -> str: ...

    def propose(self, problem: Problem) -> Sequence[Placement | Declined]:
        """Its proposals, best first, and the reasons for what it does not propose."""
