"""Pipelining: a stream of micro-batches over stages or dealt whole, and models that fit on no server.

The alternatives for a stream are compared by their predicted time: its elements dealt over the servers
(each needs all weights), or stages with all elements flowing through (each has its own part of them). A
single batch may be split. A chain whose weights fit on no one server runs in stages, whatever it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from genie.scheduler.batch_split import batch_splits
from genie.scheduler.cutting import stages
from genie.scheduler.placing import (
    Servers,
    completed,
    free_bytes,
    missing_bytes,
    proposal,
    server_counts,
    settled,
)
from genie.scheduler.plan import Declined, Placement
from genie.scheduler.problem import Problem
from genie.scheduler.towers import longest_first, stream
from genie.scheduler.validate import peak_bytes
from genie.srg.graph import Phase


class Pipelining:
    name = "pipelining"

    def propose(self, problem: Problem) -> Sequence[Placement | Declined]:
        if len(problem.cluster.devices) < 2:
            return [Declined(self.name, "the pool has one server")]
        elements = stream(problem)
        reserve = peak_bytes(problem)
        too_large = _too_large(problem, reserve)
        proposals: list[Placement | Declined] = []
        if elements:
            proposals += self._dealt(problem, elements)
        if problem.cluster.peer is None:
            proposals.append(Declined(self.name, "the servers cannot reach each other, so no stages"))
        elif elements or too_large:
            if too_large:
                proposals += self._where_weights_are(problem)
            chains = elements or [list(range(len(problem.graph.nodes)))]
            proposals += self._staged(problem, chains, reserve, fit=too_large)
        if not elements and not too_large:
            if any(n.stage is not None for n in problem.graph.nodes) and _encodes(problem):
                proposals += batch_splits(problem, self.name)
            if not proposals:
                proposals.append(
                    Declined(self.name, "no stream of micro-batches, and the weights fit on one server")
                )
        return proposals

    def _dealt(self, problem: Problem, elements: list[list[int]]) -> list[Placement | Declined]:
        """Each element whole on one server."""
        devices = problem.cluster.devices
        seconds = [[sum(problem.seconds[d.index][i] for i in e) for e in elements] for d in devices]
        dealt = longest_first(seconds, [[0] * len(elements) for _ in devices])
        wish: list[Servers | None] = [None] * len(problem.graph.nodes)
        for element, server in zip(elements, dealt, strict=True):
            for i in element:
                wish[i] = (server,)
        counts = ", ".join(f"{dealt.count(d.index)} on server {d.index}" for d in devices)
        servers = settled(problem, completed(problem, wish))
        why = f"{len(elements)} elements of the stream: {counts}"
        return [proposal(problem, Placement(self.name, servers, why, label="elements dealt"))]

    def _staged(
        self, problem: Problem, chains: list[list[int]], reserve: int, *, fit: bool
    ) -> list[Placement | Declined]:
        """All chains in the same stages, one a server, for several numbers of servers."""
        devices = problem.cluster.devices
        fastest = sorted((sum(problem.seconds[d.index]), d.index) for d in devices)
        proposals: list[Placement | Declined] = []
        for k in server_counts(len(devices)):
            chosen = sorted(index for _, index in fastest[:k])
            label = f"{k} stages"
            cuts = stages(problem, chains[0], chosen, reserve, fit=fit)
            if cuts is None:
                why = "no cut leaves each server a part that fits" if fit else "it cannot be cut there"
                proposals.append(Declined(self.name, f"{why} (servers {chosen})", label))
                continue
            wish: list[Servers | None] = [None] * len(problem.graph.nodes)
            for chain in chains:
                bounds = [0, *cuts, len(chain)]
                for server, (start, stop) in zip(chosen, pairwise(bounds), strict=True):
                    for i in chain[start:stop]:
                        wish[i] = (server,)
            servers = settled(problem, completed(problem, wish))
            text = _stages_text(problem, chains, chosen, cuts)
            proposals.append(proposal(problem, Placement(self.name, servers, text, label=label)))
        return proposals

    def _where_weights_are(self, problem: Problem) -> list[Placement | Declined]:
        """As an earlier plan left them: each instruction where its weights and its state are."""
        flow, where = problem.flow, problem.where
        if not all(v in where and where[v].servers for v in flow.weights):
            return []
        wish: list[Servers | None] = []
        here: Servers = (problem.cluster.home,)
        for node in problem.graph.nodes:
            held = [
                where[v].servers
                for v in flow.inputs[node.number]
                if v < 0 and v in where and where[v].servers
            ]
            if held and not any(set(here).issubset(s) for s in held):
                here = held[0][:1]
            wish.append(here)
        servers = settled(problem, completed(problem, wish))
        why = "the weights fit on no one server: each instruction is where its weights are"
        return [proposal(problem, Placement(self.name, servers, why, label="stages as they are"))]


def _stages_text(problem: Problem, chains: list[list[int]], servers: list[int], cuts: list[int]) -> str:
    chain = chains[0]
    bounds = [0, *cuts, len(chain)]
    parts = []
    for server, (start, stop) in zip(servers, pairwise(bounds), strict=True):
        seconds = sum(problem.seconds[server][i] for i in chain[start:stop])
        parts.append(f"{seconds * 1e3:.1f} ms on server {server}")
    flowing = f", {len(chains)} elements flowing" if len(chains) > 1 else ""
    return f"stages of {' + '.join(parts)}{flowing}"


def _encodes(problem: Problem) -> bool:
    return not any(n.phase in (Phase.PREFILL, Phase.DECODE) for n in problem.graph.nodes)


def _too_large(problem: Problem, reserve: int) -> bool:
    """No one server can hold all weights beside the activations."""
    weights = sorted(problem.flow.weights)
    return all(
        missing_bytes(problem, weights, d.index) + reserve > free_bytes(problem, d.index)
        for d in problem.cluster.devices
    )
