"""What must move so that every instruction finds its inputs: derived from a placement alone."""

from __future__ import annotations

from collections.abc import Mapping

from genie.scheduler.plan import Placement, Transfer
from genie.scheduler.problem import Problem
from genie.scheduler.where import Axis, Shard, Where

CLIENT = -1


def made_at(problem: Problem, placement: Placement, value: int) -> Where:
    """Where ``value`` is as it is made (an external: as given), before anything moves."""
    if value < 0:
        return problem.where.get(value, Where())
    servers, split = placement.servers[problem.flow.made[value]], placement.split
    if split and len(servers) > 1 and value in split.batch.axes:
        return Where((), split.batch.axes[value], split.shards)
    return Where(servers)


def locations(problem: Problem, placement: Placement) -> dict[int, Where]:
    """Where each value is after the window: those that it made, and the externals that it wrote to. What was
    moved elsewhere is a copy that may be dropped."""
    found = {v: made_at(problem, placement, v) for outputs in problem.flow.outputs for v in outputs}
    return found | rewritten(problem, placement)


def rewritten(problem: Problem, placement: Placement) -> dict[int, Where]:
    """Where the externals are that the window wrote to: there, whatever else had a copy."""
    found: dict[int, Where] = {}
    split = placement.split
    for v, last in problem.flow.last_write.items():
        if v >= 0:
            continue
        servers = placement.servers[last]
        if split and len(servers) > 1 and v in split.batch.axes:
            found[v] = Where((), split.batch.axes[v], split.shards)
        else:
            found[v] = Where(servers)
    return found


def transfers(problem: Problem, placement: Placement) -> tuple[Transfer, ...]:
    """In order of the instructions that need them. Each (value, target) moves once: whole, or as the rows
    that the target works on; a target that needs the whole after it had its rows gets the others.

    Takes a placement that `validate` has passed.
    """
    flow, split = problem.flow, placement.split
    axes: Mapping[int, Axis] = split.batch.axes if split else {}
    own = {s.server: s for s in split.shards} if split else {}
    found: list[Transfer] = []
    have: set[tuple[int, int, bool]] = set()  # (value, server, rows only)
    changed = rewritten(problem, placement)
    at, made, seen = placement.servers, flow.made, dict[tuple[int, ...], set[int]]()
    for number, servers in enumerate(at):
        read = seen.get(servers)
        if read is None:
            read = seen[servers] = set()
        for v in flow.inputs[number]:
            # Made by the same servers, in rows or whole as it is read: it is there.
            if v in read or (v >= 0 and at[made[v]] == servers):
                continue
            here = made_at(problem, placement, v)
            if v not in changed:
                read.add(v)
            elif number > flow.last_write[v]:
                here = changed[v]
            rows = split is not None and len(servers) > 1 and v in axes
            for server in servers:
                if server in here.servers or (v, server, rows) in have or (v, server, False) in have:
                    continue
                have.add((v, server, rows))
                if rows:
                    assert split is not None
                    _rows(problem, v, here, own[server], split.batch.size, number, found)
                else:
                    _whole(problem, v, here, server, number, found)
    return tuple(found)


def _rows(
    problem: Problem, v: int, here: Where, shard: Shard, size: int, before: int, found: list[Transfer]
) -> None:
    if shard in here.shards:
        return
    nbytes = problem.flow.nbytes[v] * shard.rows // size
    source = here.servers[0] if here.servers else CLIENT
    found.append(
        Transfer(v, source, shard.server, nbytes, before, "scatter", after=problem.flow.ready(v, before))
    )


def _whole(problem: Problem, v: int, here: Where, server: int, before: int, found: list[Transfer]) -> None:
    flow = problem.flow
    nbytes, after = flow.nbytes[v], flow.ready(v, before)
    if here.shards:
        size = here.shards[-1].stop
        for shard in here.shards:
            if shard.server != server:
                part = nbytes * shard.rows // size
                found.append(Transfer(v, shard.server, server, part, before, "gather", after=after))
        return
    source = here.servers[0] if here.servers else CLIENT
    once = v in flow.weights
    found.append(Transfer(v, source, server, nbytes, before, "copy", once, after))
