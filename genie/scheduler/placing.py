"""What every policy needs to turn a wish into a placement that can be carried out."""

from __future__ import annotations

from collections.abc import Container, Sequence

from genie.errors import PlanError
from genie.scheduler.plan import Declined, Placement
from genie.scheduler.problem import Problem
from genie.scheduler.validate import validate

Servers = tuple[int, ...]


def settled(
    problem: Problem, wish: Sequence[Servers], axes: Container[int] = frozenset()
) -> tuple[Servers, ...]:
    """``wish`` with what is not free put in its place: random ops on the home server; instructions that
    share memory which is written to together, where that memory is; views that outlive the window where
    their base is. Values in ``axes`` have the batch of a split. A window whose constraints contradict each
    other stays invalid: see `proposal`.
    """
    flow, home = problem.flow, (problem.cluster.home,)
    servers = list(wish)
    if not (flow.random or flow.last_write or flow.leaving_views):
        return tuple(servers)
    for number in flow.random:
        servers[number] = home
    for group in flow.groups:
        target = servers[group[0]]
        if flow.random and not flow.random.isdisjoint(group):
            target = home
        for i in group:
            servers[i] = target
    for root in flow.last_write:
        if root < 0:
            _settle_external(problem, root, servers, root in axes)
    _settle_views(problem, servers)
    return tuple(servers)


def _settle_external(problem: Problem, root: int, servers: list[Servers], batched: bool) -> None:
    flow = problem.flow
    last = flow.last_write[root]
    where = problem.where.get(root)
    target = servers[last] if batched else servers[last][:1]
    if where is not None and not where.on_client:
        fixed = root not in problem.movable
        if where.shards:
            owners = tuple(sorted(s.server for s in where.shards))
            if target != owners and fixed:
                target = owners
        elif fixed and (len(target) > 1 or target[0] not in where.servers):
            target = next(((s,) for s in target if s in where.servers), where.servers[:1])
    for i in flow.group_of.get(last, (last,)):
        servers[i] = target
    shared = problem.alias.get(root)
    if shared is not None:
        for number, inputs in enumerate(flow.inputs):
            if any(problem.alias.get(flow.root[v]) == shared for v in inputs):
                for i in flow.group_of.get(number, (number,)):
                    servers[i] = target


def _settle_views(problem: Problem, servers: list[Servers]) -> None:
    root, producer = problem.flow.root, problem.graph.wiring.producer
    first: dict[int, Servers] = {}
    for number, value in problem.flow.leaving_views:
        base = root[value]
        owner, where = producer[base].number, problem.where.get(base)
        if owner >= 0:
            servers[number] = servers[owner]
        elif where is None or where.on_client or where.shards:
            servers[number] = first.setdefault(base, servers[number])
        elif not set(servers[number]).issubset(where.servers):
            servers[number] = where.servers[:1]


def completed(problem: Problem, wish: Sequence[Servers | None]) -> list[Servers]:
    """Places what ``wish`` leaves open: on the server with the most bytes of its inputs; before any such,
    on that of its first reader. Preparation that is cheap, and views, run on each server that reads them."""
    flow = problem.flow
    servers = list(wish)
    for number in [i for i, s in enumerate(wish) if s is None]:
        held: dict[int, int] = {}
        for v in flow.inputs[number]:
            at = servers[flow.made[v]] if flow.made[v] >= 0 else None
            if at is not None:
                held[at[0]] = held.get(at[0], 0) + flow.nbytes[v]
        if held:
            servers[number] = (max(held, key=lambda s: (held[s], -s)),)
    readers, outputs = flow.readers, flow.outputs
    following = frozenset(flow.followers)
    for number in sorted({*flow.followers, *(i for i, s in enumerate(servers) if s is None)}, reverse=True):
        found: set[int] = set()
        for v in outputs[number]:
            for i in readers.get(v, ()):
                found.update(servers[i] or ())
        if found and number in following:
            servers[number] = tuple(sorted(found))
        elif servers[number] is None:
            servers[number] = (min(found),) if found else (problem.cluster.home,)
    return [s or (problem.cluster.home,) for s in servers]


def proposal(problem: Problem, placement: Placement) -> Placement | Declined:
    """``placement``, or that it cannot be: a window may hold state on two servers that must be on one."""
    try:
        validate(problem, placement)
    except PlanError as error:
        return Declined(placement.policy, str(error), placement.label)
    return placement


def server_counts(most: int) -> list[int]:
    """Over how many servers a split is tried: up to four each number, then doubling, and all. Each is a
    candidate to simulate, and a number between two of them gains little."""
    return sorted({k for k in (2, 3, 4, *(1 << i for i in range(3, 16)), most) if 2 <= k <= most})


def missing_bytes(problem: Problem, weights: Sequence[int], server: int) -> int:
    """Of ``weights`` (external values), those that ``server`` does not have."""
    where, nbytes = problem.where, problem.flow.nbytes
    return sum(nbytes[v] for v in weights if v not in where or server not in where[v].servers)


def free_bytes(problem: Problem, server: int) -> float:
    """What ``server`` may still hold; infinite where no limit is known."""
    device = problem.cluster.devices[server]
    return device.memory_limit - device.held_bytes if device.memory_limit else float("inf")


def megabytes(nbytes: float) -> str:
    return f"{nbytes / 1e6:.1f} MB"
