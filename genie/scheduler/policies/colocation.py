"""Stateful co-location: a window runs on one server, the one that holds its state.

The KV cache and its decoder so stay together for the life of a request. A window without state goes
where its weights are and the load is least.
"""

from __future__ import annotations

from collections.abc import Sequence

from genie.scheduler.placing import megabytes, missing_bytes, proposal, settled
from genie.scheduler.plan import Declined, Placement
from genie.scheduler.problem import Problem


class Colocation:
    """``on``: the server, whatever speaks for another; None: as the module says."""

    name = "colocation"

    def __init__(self, on: int | None = None) -> None:
        self._on = on

    def propose(self, problem: Problem) -> Sequence[Placement | Declined]:
        """Always one placement. Only random ops, and state that lies elsewhere and is written to, are not
        on the one server."""
        held = _state(problem)
        if self._on is not None:
            server, why = self._on, "as it was told to"
        elif held:
            server = max(held, key=lambda s: (held[s], -s))
            why = f"its state ({megabytes(held[server])} of {megabytes(sum(held.values()))}) is there"
        else:
            server, why = _least_loaded(problem)
        servers = settled(problem, [(server,)] * len(problem.graph.nodes))
        return [
            proposal(
                problem, Placement(self.name, servers, f"server {server}: {why}", label=f"server {server}")
            )
        ]


def _state(problem: Problem) -> dict[int, int]:
    """Bytes of state by server: what earlier windows left there, weights apart. State of no size counts."""
    held: dict[int, int] = {}
    flow = problem.flow
    for v, where in problem.where.items():
        if v in flow.weights and v not in flow.last_write:
            continue
        for server in where.servers:
            held[server] = held.get(server, 0) + flow.nbytes[v]
        for shard in where.shards:
            rows = where.shards[-1].stop
            held[shard.server] = held.get(shard.server, 0) + flow.nbytes[v] * shard.rows // rows
    return held


def _least_loaded(problem: Problem) -> tuple[int, str]:
    cluster, weights = problem.cluster, sorted(problem.flow.weights)
    best: tuple[float, int, int] | None = None
    for device in cluster.devices:
        missing = missing_bytes(problem, weights, device.index)
        finish = device.busy_s + sum(problem.seconds[device.index])
        if missing and not cluster.nominal:
            finish += (cluster.peer or device.client).seconds(missing)
        if best is None or (finish, missing, device.index) < best:
            best = (finish, missing, device.index)
    assert best is not None
    _, missing, server = best
    load = cluster.devices[server].busy_s
    weights_are = (
        f"{megabytes(missing)} of weights are not there yet" if missing else "no weights are missing"
    )
    return server, f"no state; {weights_are}, and {load * 1e3:.1f} ms of work waits there"
