"""Proposals that give each of several servers some rows of the batch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from genie.scheduler.placing import proposal, settled
from genie.scheduler.plan import BatchSplit, Declined, Placement
from genie.scheduler.problem import Problem
from genie.scheduler.where import Shard
from genie.srg.graph import Origin


def batch_splits(problem: Problem, policy: str) -> list[Placement | Declined]:
    """One proposal for each number of servers from two, with rows in proportion to the devices' speed; or
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
        batch = problem.prove_batch(problem.graph, externals)
        if isinstance(batch, str):
            refused.append(Declined(policy, f"batch of {size}: {batch}"))
            continue
        order = sorted((sum(problem.seconds[d.index]), d.index) for d in devices)
        proposals: list[Placement | Declined] = []
        for k in range(2, min(len(devices), batch.size) + 1):
            chosen = sorted(index for _, index in order[:k])
            rows = proportional_rows(batch.size, [sum(problem.seconds[d]) for d in chosen])
            shards, at = [], 0
            for server, count in zip(chosen, rows, strict=True):
                shards.append(Shard(server, at, at + count))
                at += count
            servers = settled(problem, [tuple(chosen)] * len(problem.graph.nodes), batch.axes)
            shares = " + ".join(map(str, rows))
            proposals.append(
                proposal(problem, Placement(
                    policy, servers, f"batch of {batch.size} as {shares} rows on servers {chosen}",
                    BatchSplit(batch, tuple(shards)), f"{k} shards",
                ))
            )  # fmt: skip
        return proposals
    return refused


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
