"""What a split leaves to be joined: state in shards, which the next window needs on one server."""

from __future__ import annotations

from typing import NamedTuple

from genie.scheduler.plan import Placement
from genie.scheduler.problem import Problem
from genie.scheduler.transfers import made_at, rewritten
from genie.srg.graph import Residency


class Join(NamedTuple):
    """``nbytes`` that move, and the ``seconds`` until all are on one server (0 without a cost model)."""

    nbytes: int
    seconds: float


def join_of_state(problem: Problem, placement: Placement) -> Join:
    """Of the KV caches that the window leaves in shards. The decode that follows runs on one server, so the
    others send it their rows of each: those of one server follow each other, and the receiver's own work on
    them (as in `genie.scheduler.simulate`) comes on top of the longest such line.
    """
    split, cluster = placement.split, problem.cluster
    if split is None:
        return Join(0, 0.0)
    target = max(split.shards, key=lambda s: (s.rows, -s.server)).server
    sent: dict[int, list[int]] = {}  # by server, the bytes of each message
    graph, written = problem.graph, rewritten(problem, placement)
    kept = [v for n in graph.nodes if n.leaves and n.residency is _STATE for v in n.outputs]
    kept += [v for v in written if graph.wiring.producer[v].residency is _STATE]
    for v in kept:
        for shard in (written.get(v) or made_at(problem, placement, v)).shards:
            if shard.server != target:
                part = problem.flow.nbytes[v] * shard.rows // split.batch.size
                sent.setdefault(shard.server, []).append(part)
    nbytes = sum(map(sum, sent.values()))
    if cluster.nominal or cluster.peer is None or not sent:
        return Join(nbytes, 0.0)
    longest = max(sum(cluster.peer.seconds(n) for n in parts) for parts in sent.values())
    received = cluster.transfer_s * sum(map(len, sent.values())) + nbytes / cluster.copy_bytes_per_s
    return Join(nbytes, cluster.segment_s + longest + received)


_STATE = Residency.STATEFUL_KV_CACHE
