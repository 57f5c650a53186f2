"""Proposals that give each of several servers some rows of the batch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from genie.scheduler.placing import proposal, server_counts, settled
from genie.scheduler.plan import BatchAxes, BatchSplit, Declined, Placement
from genie.scheduler.problem import Problem
from genie.scheduler.where import Shard
from genie.srg.cost import COMPUTE
from genie.srg.graph import Graph, Node, Origin


def batch_splits(problem: Problem, policy: str) -> list[Placement | Declined]:
    """A proposal for each of several numbers of servers, with rows in proportion to the devices' speed; or
    why there is none. The proof comes from ``problem.prove_batch``; without one nothing is split."""
    devices = problem.cluster.devices
    if len(devices) < 2:
        return [Declined(policy, "the pool has one server")]
    if problem.cluster.peer is None and problem.flow.random:
        return [Declined(policy, "it draws random numbers, and the servers cannot reach each other")]
    if not problem.may_split_batch:
        return [Declined(policy, "the layouts of this window have not been checked on a server yet")]
    sizes = _batches(problem)
    if not sizes:
        return [Declined(policy, "no input from the client has two or more rows")]
    if problem.prove_batch is None:
        return [Declined(policy, "nothing here can prove that the batch can be split")]
    refused: list[Placement | Declined] = []
    for size, externals in sizes:
        batch, end = _proven(problem, externals)
        if isinstance(batch, str):
            refused.append(Declined(policy, f"batch of {size}: {batch}"))
            continue
        order = sorted((sum(problem.seconds[d.index]), d.index) for d in devices)
        proposals: list[Placement | Declined] = []
        least = float("inf")
        for k in server_counts(min(len(devices), batch.size)):
            chosen = sorted(index for _, index in order[:k])
            rows = proportional_rows(batch.size, [sum(problem.seconds[d]) for d in chosen])
            seconds = max(n * sum(problem.seconds[d]) for n, d in zip(rows, chosen, strict=True))
            if seconds >= least:
                continue  # one server more, and the longest is as long
            least = seconds
            shards, at = [], 0
            for server, count in zip(chosen, rows, strict=True):
                shards.append(Shard(server, at, at + count))
                at += count
            rest = len(problem.graph.nodes) - end
            servers = settled(problem, [tuple(chosen)] * end + [(chosen[0],)] * rest, batch.axes)
            shares = " + ".join(map(str, rows))
            proposals.append(
                proposal(problem, Placement(
                    policy, servers, f"batch of {batch.size} as {shares} rows on servers {chosen}",
                    BatchSplit(batch, tuple(shards)), f"{k} shards",
                ))
            )  # fmt: skip
        return proposals
    return refused


def _proven(problem: Problem, externals: list[int]) -> tuple[BatchAxes | str, int]:
    """The proof, and the end of the instructions that it covers. Where the whole window does not split, all
    to the last arithmetic may: what follows (a test whether any sequence goes on) then runs on one server."""
    graph, prove = problem.graph, problem.prove_batch
    assert prove is not None
    # A seed concerns no value; it stays on its own server.
    nodes = [n for n in graph.nodes if n.inputs or n.outputs]
    batch = prove(_part(graph, nodes), externals)
    end = 1 + max((n.number for n in nodes if n.name in COMPUTE), default=-1)
    if isinstance(batch, str) and 0 < end < len(graph.nodes):
        part = [n for n in nodes if n.number < end]
        begun = prove(_part(graph, part), externals)
        if not isinstance(begun, str):
            return begun, end
    return batch, len(graph.nodes)


def _part(graph: Graph, nodes: list[Node]) -> Graph:
    """Some instructions of ``graph``, with the lookups of all."""
    part = Graph(graph.externals, nodes, graph.digest)
    part.__dict__["wiring"] = graph.wiring
    return part


def _batches(problem: Problem) -> list[tuple[int, list[int]]]:
    """Sizes of dimension 0 of what the client gave, the most common first, with their externals."""
    found: dict[int, list[int]] = {}
    bytes_of: Counter[int] = Counter()
    for node in problem.graph.externals:
        v, spec = node.outputs[0], node.specs[0]
        where = problem.where.get(v)
        given = where is None or where.on_client or (node.origin is Origin.HOST and not where.shards)
        if given and v not in problem.flow.weights and spec is not None and spec.shape and spec.shape[0] > 1:
            found.setdefault(spec.shape[0], []).append(v)
            bytes_of[spec.shape[0]] += problem.flow.nbytes[v]
    return sorted(found.items(), key=lambda item: (-len(item[1]), -bytes_of[item[0]], -item[0]))


def proportional_rows(size: int, seconds: Sequence[float]) -> list[int]:
    """``size`` rows (at least one each) over devices that need ``seconds`` for all of them: so that the
    longest takes the least time that whole rows allow."""
    rows = [1] * len(seconds)
    for _ in range(size - len(seconds)):
        next_end = [(count + 1) * s for count, s in zip(rows, seconds, strict=True)]
        rows[next_end.index(min(next_end))] += 1
    return rows
