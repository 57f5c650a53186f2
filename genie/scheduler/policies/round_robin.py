"""Round-robin: each call of a window on the next server. What a scheduler without semantics does."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from genie.scheduler.placing import proposal, settled
from genie.scheduler.plan import Declined, Placement
from genie.scheduler.problem import Problem


class RoundRobin:
    name = "round_robin"

    def propose(self, problem: Problem) -> Sequence[Placement | Declined]:
        """The first call goes to server ``problem.turn`` modulo the servers."""
        count = len(problem.cluster.devices)
        starts = [s for s in sorted(set(problem.calls)) if s > 0]
        bounds = [0, *starts, len(problem.graph.nodes)]
        wish: list[tuple[int, ...]] = []
        for k, (start, stop) in enumerate(pairwise(bounds)):
            wish += [((problem.turn + k) % count,)] * (stop - start)
        return [proposal(problem, Placement(self.name, settled(problem, wish), "calls take turns"))]
