"""Parallel branches: independent towers on different servers, joined where they meet."""

from __future__ import annotations

from collections.abc import Sequence

from genie.scheduler.placing import Servers, completed, missing_bytes, proposal, settled
from genie.scheduler.plan import Declined, Placement
from genie.scheduler.problem import Problem
from genie.scheduler.towers import longest_first, towers


class Branches:
    name = "branches"

    def propose(self, problem: Problem) -> Sequence[Placement | Declined]:
        """One placement: towers balanced by cost, the fusion where most bytes of its inputs are, cheap
        preparation wherever it is read."""
        devices, flow = problem.cluster.devices, problem.flow
        found = towers(problem)
        if not found:
            return [Declined(self.name, "there are no two independent towers")]
        if len(devices) < 2:
            return [Declined(self.name, "the pool has one server")]
        if problem.cluster.peer is None:
            return [Declined(self.name, "the servers cannot reach each other, so towers cannot be joined")]
        seconds = [[sum(problem.seconds[d.index][i] for i in tower) for tower in found] for d in devices]
        weights = [sorted({v for i in tower for v in flow.inputs[i] if v in flow.weights}) for tower in found]
        missing = [[missing_bytes(problem, w, d.index) for w in weights] for d in devices]
        dealt = longest_first(seconds, missing)
        wish: list[Servers | None] = [None] * len(problem.graph.nodes)
        for tower, server in zip(found, dealt, strict=True):
            for i in tower:
                wish[i] = (server,)
        parts = ", ".join(
            f"{_name(problem, tower)} ({seconds[server][k] * 1e3:.1f} ms) on server {server}"
            for k, (tower, server) in enumerate(zip(found, dealt, strict=True))
        )
        if len(set(dealt)) < 2:
            return [Declined(self.name, f"all towers are done first on one server: {parts}")]
        servers = settled(problem, completed(problem, wish))
        return [proposal(problem, Placement(self.name, servers, parts, label=f"{len(found)} towers"))]


def _name(problem: Problem, tower: list[int]) -> str:
    node = problem.graph.nodes[tower[len(tower) // 2]]
    return f"{node.modality} tower" if node.modality != "unknown" else f"tower {node.branch}"
