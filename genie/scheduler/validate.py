"""Whether a placement can be carried out. What cannot is an error that names what is wrong."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from genie.errors import PlanError
from genie.scheduler.plan import Placement, Transfer
from genie.scheduler.problem import Problem
from genie.scheduler.transfers import CLIENT
from genie.srg.graph import Node


def validate(problem: Problem, placement: Placement) -> None:
    """Raises PlanError, naming the policy and the instruction or the edge. What has passed is not looked at
    again."""
    if any(placement is known for known in problem.valid):
        return
    _servers(problem, placement)
    _split(problem, placement)
    _random(problem, placement)
    _memory_that_is_written(problem, placement)
    _shared_memory(problem, placement)
    _shards_that_were_there(problem, placement)
    problem.valid.append(placement)


def unreachable(problem: Problem, moved: Sequence[Transfer]) -> str | None:
    """The first move between servers that cannot reach each other; None when there is none."""
    if problem.cluster.peer is None:
        for t in moved:
            if t.source != CLIENT:
                return (
                    f"instruction {describe(problem.graph.nodes[t.before])} on server {t.target} needs "
                    f"{value_name(t.value)} from server {t.source}, and these servers cannot reach each other"
                )
    return None


def shortage(problem: Problem, placement: Placement, moved: Sequence[Transfer]) -> str | None:
    """Which server has too little memory for this placement; None when all have enough or set no limit.

    An estimate: what the server holds, all that moves to it (weights, inputs, copies), and the values made
    there at the moment when most of them are alive. Results that leave stay alive to the end.
    """
    for device in problem.cluster.devices:
        if not device.memory_limit:
            continue
        arriving = sum(t.nbytes for t in moved if t.target == device.index)
        needed = arriving + _peak(problem, placement, device.index)
        free = device.memory_limit - device.held_bytes
        if needed > free:
            return (
                f"needs {needed / 1e6:.1f} MB on server {device.index} ({arriving / 1e6:.1f} MB of it moved "
                f"there), which has {max(free, 0) / 1e6:.1f} MB of {device.memory_limit / 1e6:.1f} MB left"
            )
    return None


def peak_bytes(problem: Problem) -> int:
    """Most bytes of made values alive at once, if all ran on one server; 0 where no server has a limit."""
    devices = problem.cluster.devices
    if not any(d.memory_limit for d in devices):
        return 0
    first = devices[0].index
    everything = Placement("", ((first,),) * len(problem.graph.nodes), "")
    return _peak(problem, everything, first)


def _peak(problem: Problem, placement: Placement, server: int) -> int:
    flow, graph, split = problem.flow, problem.graph, placement.split
    last_touch, made = flow.last_touch, flow.made
    end = len(graph.nodes)
    dies: list[list[int]] = [[] for _ in range(end + 1)]
    rows = {s.server: s.rows / split.batch.size for s in split.shards}.get(server, 1.0) if split else 1.0
    alive = peak = 0
    for node, servers in zip(graph.nodes, placement.servers, strict=True):
        if server in servers and not node.is_view:
            for v in node.outputs:
                nbytes = flow.nbytes[v]
                if split and len(servers) > 1 and v in split.batch.axes:
                    nbytes = int(nbytes * rows)
                alive += nbytes
                dies[end if node.leaves else max(last_touch.get(v, -1), made[v])].append(nbytes)
        peak = max(peak, alive)
        alive -= sum(dies[node.number])
    return peak


def _servers(problem: Problem, placement: Placement) -> None:
    nodes, known = problem.graph.nodes, {d.index for d in problem.cluster.devices}
    if len(placement.servers) != len(nodes):
        raise PlanError(
            f"policy {placement.policy} placed {len(placement.servers)} instructions of {len(nodes)}: return "
            "servers for each instruction of problem.graph.nodes, in order"
        )
    checked: set[tuple[int, ...]] = set()
    for number, servers in enumerate(placement.servers):
        if servers in checked:
            continue
        if not servers or list(servers) != sorted(set(servers)) or not known.issuperset(servers):
            raise _error(
                problem, placement, number,
                f"is placed on {servers!r}: name one or more of the servers {sorted(known)}, ascending",
            )  # fmt: skip
        checked.add(servers)
    if placement.split is None and any(len(servers) > 1 for servers in checked):
        for number, servers in enumerate(placement.servers):
            if len(servers) > 1 and not problem.flow.cheap(nodes[number]):
                raise _error(
                    problem, placement, number,
                    f"is placed on servers {servers} without a split of the batch, but only cheap ops "
                    "without randomness may run as copies: place it on one",
                )  # fmt: skip


def _split(problem: Problem, placement: Placement) -> None:
    split = placement.split
    if split is None:
        return
    if not problem.may_split_batch:
        raise PlanError(f"policy {placement.policy} splits the batch of a window that may not be split yet")
    at = 0
    for shard in split.shards:
        if shard.start != at or shard.rows < 1:
            raise PlanError(
                f"policy {placement.policy}: its split has rows {shard.start} to {shard.stop} on server "
                f"{shard.server} where row {at} must come next: shards cover all rows in order"
            )
        at = shard.stop
    owners = tuple(s.server for s in split.shards)
    if at != split.batch.size or len(set(owners)) != len(owners):
        raise PlanError(
            f"policy {placement.policy}: its split covers {at} of {split.batch.size} rows on servers "
            f"{owners}; shards cover all rows, each on another server"
        )
    axes, everywhere, spec = split.batch.axes, tuple(sorted(owners)), problem.graph.wiring.spec
    for v, axis in axes.items():
        known = spec.get(v)
        if v not in spec or (
            known is not None
            and (axis.dim >= len(known.shape) or known.shape[axis.dim] != split.batch.size * axis.inner)
        ):
            raise PlanError(
                f"policy {placement.policy}: its split says that dimension {axis.dim} of {value_name(v)} is "
                f"the batch of {split.batch.size}, which that value does not have"
            )
    for node, servers in zip(problem.graph.nodes, placement.servers, strict=True):
        if len(servers) == 1 or servers == everywhere:
            continue
        batched = [v for v in (*node.inputs, *node.outputs) if v in axes]
        if batched:
            raise _error(
                problem, placement, node.number,
                f"works on {value_name(batched[0])}, which has the batch, on servers {servers}: its rows are "
                f"on {everywhere}; place it on all of them or on one",
            )  # fmt: skip
    _local(problem, placement, split.batch.local)


def _local(problem: Problem, placement: Placement, local: Collection[int]) -> None:
    """What means something only to the part that made it is used there."""
    made, servers = problem.flow.made, placement.servers
    for v in local:
        for number in problem.flow.readers.get(v, ()):
            if servers[number] != servers[made[v]]:
                raise _error(
                    problem, placement, number,
                    f"reads {value_name(v)} on servers {servers[number]}, which means something only to its "
                    f"part of the batch, on {servers[made[v]]}: place it there",
                )  # fmt: skip


def _random(problem: Problem, placement: Placement) -> None:
    home = (problem.cluster.home,)
    for number in sorted(problem.flow.random):
        if placement.servers[number] != home:
            raise _error(
                problem, placement, number,
                f"uses the session's random state on servers {placement.servers[number]}: place it on "
                f"server {home[0]}, which has that state",
            )  # fmt: skip


def _memory_that_is_written(problem: Problem, placement: Placement) -> None:
    """One alias set, one place, as long as it changes: copies made earlier would miss a write."""
    flow, nodes = problem.flow, problem.graph.nodes
    for group in flow.groups:
        expected = placement.servers[group[0]]
        for number in group[1:]:
            if placement.servers[number] != expected:
                raise _error(
                    problem, placement, number,
                    f"is placed on servers {placement.servers[number]}, but shares memory that is written to "
                    f"with instruction {describe(nodes[group[0]])} on {expected}: place both alike",
                )  # fmt: skip
    producer = problem.graph.wiring.producer
    homes: dict[int, tuple[tuple[int, ...], int]] = {}  # alias set -> where it is written, by whom
    for root, last in flow.last_write.items():
        if producer[root].number >= 0:
            continue
        where, servers = problem.where.get(root), placement.servers[last]
        sharded = placement.split is not None and root in placement.split.batch.axes and len(servers) > 1
        if len(servers) > 1 and not sharded:
            raise _error(
                problem, placement, last,
                f"writes to {value_name(root)} on servers {servers}: place it on one, or split the batch",
            )  # fmt: skip
        if where is not None and not where.on_client and root not in problem.movable:
            alike = sharded and placement.split is not None and where.shards == placement.split.shards
            if not alike and (where.shards or sharded or servers[0] not in where.servers):
                there = where.servers or tuple(s.server for s in where.shards)
                raise _error(
                    problem, placement, last,
                    f"writes to {value_name(root)} on servers {servers}, but that value is on {there}: "
                    "place it there",
                )  # fmt: skip
        shared = problem.alias.get(root)
        if shared is not None:
            expected, first = homes.setdefault(shared, (servers, last))
            if expected != servers:
                raise _error(
                    problem, placement, last,
                    f"writes to {value_name(root)} on servers {servers}, whose memory instruction "
                    f"{describe(nodes[first])} writes to on {expected}: place both alike",
                )  # fmt: skip
    if homes:
        _readers_of_shared_memory(problem, placement, homes)


def _readers_of_shared_memory(
    problem: Problem, placement: Placement, homes: dict[int, tuple[tuple[int, ...], int]]
) -> None:
    """Externals that share memory with a written one have values of their own, so the graph does not
    show which reads come after a write: all of them must be where the memory is."""
    root, alias = problem.flow.root, problem.alias
    for number, inputs in enumerate(problem.flow.inputs):
        for v in inputs:
            shared = alias.get(root[v])
            if shared in homes and placement.servers[number] != homes[shared][0]:
                raise _error(
                    problem, placement, number,
                    f"reads {value_name(v)} on servers {placement.servers[number]}, whose memory instruction "
                    f"{describe(problem.graph.nodes[homes[shared][1]])} writes to on {homes[shared][0]}: "
                    "place both alike",
                )  # fmt: skip


def _shared_memory(problem: Problem, placement: Placement) -> None:
    """Views that outlive the window stay with what they are views of: a later window may write to it."""
    producer, root = problem.graph.wiring.producer, problem.flow.root
    first: dict[int, tuple[int, ...]] = {}
    for number, value in problem.flow.leaving_views:
        base = root[value]
        servers, owner = placement.servers[number], producer[base].number
        where = problem.where.get(base)
        if owner >= 0:
            expected = placement.servers[owner]
        elif where is None or where.on_client or where.shards:
            expected = first.setdefault(base, servers)
        else:
            expected = where.servers
        if not set(servers).issubset(expected) or (owner >= 0 and servers != expected):
            raise _error(
                problem, placement, number,
                f"makes a view of {value_name(base)} that outlives the window on servers {servers}, but that "
                f"value is on {expected}: place the view there",
            )  # fmt: skip


def _shards_that_were_there(problem: Problem, placement: Placement) -> None:
    split = placement.split
    if split is None:
        return
    for v, where in problem.where.items():
        if not where.shards or v not in split.batch.axes:
            continue
        if where.shards == split.shards and where.axis == split.batch.axes[v]:
            continue
        for number, inputs in enumerate(problem.flow.inputs):
            if v in inputs and len(placement.servers[number]) > 1:
                raise _error(
                    problem, placement, number,
                    f"needs rows of {value_name(v)}, which is split in another way ({where.shards}): split "
                    "alike, or place the instruction on one server",
                )  # fmt: skip


def describe(node: Node) -> str:
    return f"{node.number} ({node.op}{f' in {node.module}' if node.module else ''})"


def value_name(value: int) -> str:
    """As `genie.srg.text` writes it."""
    return f"%{value}" if value >= 0 else f"e{-value - 1}"


def _error(problem: Problem, placement: Placement, number: int, what: str) -> PlanError:
    return PlanError(f"policy {placement.policy}: instruction {describe(problem.graph.nodes[number])} {what}")
