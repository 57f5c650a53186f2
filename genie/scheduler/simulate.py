"""How long a placement takes: an event simulation of servers and links."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate

from genie.scheduler.plan import Placement, Transfer
from genie.scheduler.problem import Problem
from genie.scheduler.transfers import CLIENT


def predict(
    problem: Problem, placement: Placement, moved: Sequence[Transfer]
) -> tuple[float, tuple[float, ...]]:
    """Seconds from the first message until the last result is ready on a server, and the seconds that each
    server executes. Other windows' work (`Device.busy_s`) and what moves ``once`` are left out.

    Each server takes its instructions in program order. A transfer leaves when its source is done with the
    instruction ``after``; transfers from one server to one other follow each other; the target waits for
    it at ``before``. The client sends all inputs of a server in its first message. Where no cost model is
    used, only execution counts.
    """
    cluster = problem.cluster
    free = cluster.nominal
    own, done = _work(problem, placement)
    busy = tuple(sums[-1] for sums in done)
    clock = [0.0 if free else d.client.rtt_s / 2 + cluster.segment_s for d in cluster.devices]
    position = [0] * len(clock)
    arrival = _uploads(problem, moved)
    link_free: dict[tuple[int, int], float] = {}
    overhead = 0.0 if free else cluster.transfer_s

    def advance(server: int, number: int) -> None:
        """Runs ``server``'s instructions before ``number``."""
        reached = bisect_left(own[server], number, position[server])
        clock[server] += done[server][reached] - done[server][position[server]]
        position[server] = reached

    # In program order a transfer is sent before it is waited for, since ``after`` < ``before``.
    events: list[tuple[int, int, int, int]] = []
    for k, t in enumerate(moved):
        if not t.once:
            events.append((t.before, 1, t.target, k))
            if t.source != CLIENT:
                events.append((t.after + 1, 0, t.source, k))
    last: tuple[int, int, int] | None = None
    for number, receives, server, k in sorted(events):
        t = moved[k]
        advance(server, number)
        copy_s = 0.0 if free else t.nbytes / cluster.copy_bytes_per_s
        # A client's input comes with the message that starts the server's work.
        if not free and (number, receives, server) != last and t.source != CLIENT:
            clock[server] += cluster.segment_s
        last = (number, receives, server)
        if receives:
            clock[server] = max(clock[server], arrival[k]) + copy_s
            if t.source != CLIENT:
                clock[server] += overhead
        else:
            clock[server] += overhead + copy_s
            line = (t.source, t.target)
            start = max(clock[server], link_free.get(line, 0.0))
            link = cluster.peer
            arrival[k] = link_free[line] = start + (0.0 if free or link is None else link.seconds(t.nbytes))
    end = 0.0
    for server in range(len(clock)):
        if own[server]:
            advance(server, len(placement.servers))
            end = max(end, clock[server])
    return end, busy


def _work(problem: Problem, placement: Placement) -> tuple[list[list[int]], list[list[float]]]:
    """Of each server: the numbers of its instructions, and the prefix sums of their seconds."""
    count = len(problem.cluster.devices)
    own: list[list[int]] = [[] for _ in range(count)]
    seconds: list[list[float]] = [[] for _ in range(count)]
    whole, split = problem.seconds, placement.split
    part: dict[int, list[float]] = {}
    batch = (split.batch.axes if split else {}).keys()
    if split:
        part = {s.server: problem.seconds_of_share(s.server, s.rows / split.batch.size) for s in split.shards}
    outputs, inputs = problem.flow.outputs, problem.flow.inputs
    for number, servers in enumerate(placement.servers):
        if len(servers) == 1:
            server = servers[0]
            own[server].append(number)
            seconds[server].append(whole[server][number])
            continue
        batched = not (batch.isdisjoint(outputs[number]) and batch.isdisjoint(inputs[number]))
        for server in servers:
            own[server].append(number)
            seconds[server].append((part if batched else whole)[server][number])
    return own, [list(accumulate(s, initial=0.0)) for s in seconds]


def _uploads(problem: Problem, moved: Sequence[Transfer]) -> dict[int, float]:
    """When each input from the client is on its server, by number of the transfer."""
    devices = problem.cluster.devices
    at = [0.0 if problem.cluster.nominal else d.client.rtt_s / 2 for d in devices]
    arrival: dict[int, float] = {}
    for k, t in enumerate(moved):
        if t.source == CLIENT and not t.once:
            if not problem.cluster.nominal:
                at[t.target] += t.nbytes / devices[t.target].client.bytes_per_s
            arrival[k] = at[t.target]
    return arrival
