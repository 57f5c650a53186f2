"""Any valid placement of any program has the transfers with which it computes what one machine would."""

from __future__ import annotations

from collections import defaultdict

from hypothesis import given, settings
from hypothesis import strategies as st

from genie.scheduler.placing import proposal, settled
from genie.scheduler.plan import BatchAxes, BatchSplit, Placement
from genie.scheduler.problem import Problem
from genie.scheduler.simulate import predict
from genie.scheduler.transfers import CLIENT, locations, transfers
from genie.scheduler.where import Axis, Shard, Where
from genie.srg.graph import Graph, Residency
from tests.scheduler.graphs import Making, pool

ROWS = 4
SERVERS = 3


@st.composite
def programs(draw) -> Graph:
    m = Making()
    values = [m.given() for _ in range(draw(st.integers(1, 3)))]
    if draw(st.booleans()):
        values.append(m.given(Residency.PERSISTENT_WEIGHT))
    for _ in range(draw(st.integers(1, 12))):
        kind = draw(st.sampled_from(["op", "op", "op", "cheap", "view", "write"]))
        pick = st.sampled_from(values)
        if kind == "op":
            values.append(m.op(*draw(st.lists(pick, max_size=3)), us=draw(st.integers(0, 9)) * 1000))
        elif kind == "cheap":
            values.append(m.op(draw(pick), name="aten::add.Tensor"))
        elif kind == "view":
            values.append(m.view(draw(pick), leaves=draw(st.booleans())))
        else:
            written = draw(pick)
            m.op(written, *draw(st.lists(pick, max_size=2)), name="aten::add_.Tensor", writes=(written,))
    return m.graph()


@st.composite
def placements(draw) -> tuple[Problem, Placement]:
    graph = draw(programs())
    externals = [n.outputs[0] for n in graph.externals]
    split = None
    if draw(st.booleans()):
        owners = draw(st.lists(st.integers(0, SERVERS - 1), min_size=2, max_size=SERVERS, unique=True))
        stops = sorted({*draw(st.permutations(range(1, ROWS)))[: len(owners) - 1], ROWS})
        starts = [0, *stops]
        shards = tuple(
            Shard(server, start, stop)
            for server, start, stop in zip(sorted(owners), starts, stops, strict=False)
        )
        split = BatchSplit(BatchAxes(ROWS, _axes(graph, draw(st.sampled_from(externals))), {}), shards)
    where = {v: Where(tuple(sorted(draw(st.sets(st.integers(0, SERVERS - 1)))))) for v in externals}
    if split:
        for v in externals:
            if v in split.batch.axes and draw(st.booleans()):
                where[v] = Where((), split.batch.axes[v], split.shards)
    problem = Problem(graph, pool(*[1.0] * SERVERS), where)
    everywhere = tuple(sorted(s.server for s in split.shards)) if split else ()
    wish = []
    for node in graph.nodes:
        alone = (draw(st.integers(0, SERVERS - 1)),)
        if split and draw(st.booleans()):
            wish.append(everywhere)
        elif not split and problem.flow.cheap(node) and not node.writes and draw(st.booleans()):
            wish.append((0, 2))
        else:
            wish.append(alone)
    servers = settled(problem, wish, split.batch.axes if split else ())
    return problem, Placement("any", servers, "", split)


def _axes(graph: Graph, batch: int) -> dict[int, Axis]:
    """All that depends on external ``batch`` has the batch, and so does all memory that it is written to."""
    root = graph.wiring.root
    batched = {batch}
    while True:
        before = len(batched)
        for node in graph.nodes:
            if any(root[v] in batched for v in node.inputs):
                batched.update(root[v] for v in (*node.outputs, *node.writes))
        if len(batched) == before:
            return {v: Axis(0) for v in root if root[v] in batched}


class Memory(dict):
    """Row -> symbol of its content; row None: of a value without the batch."""


def rows_of(problem: Problem, placement: Placement, value: int) -> list:
    batched = placement.split is not None and value in placement.split.batch.axes
    return list(range(ROWS)) if batched else [None]


def run(node, inputs: dict[int, Memory], rows, batched, into: dict[int, Memory]) -> None:
    """One instruction on what a server sees: rows of what has the batch."""
    for v in node.outputs if node.is_view else ():
        into[v] = inputs[node.inputs[0]]
    for v in node.writes or (() if node.is_view else node.outputs):
        target = inputs[v] if node.writes else into.setdefault(v, Memory())
        new = {
            r: (node.number, *(inputs[i][r if batched(i) else None] for i in node.inputs))
            for r in (rows if batched(v) else [None])
        }
        target.update(new)


@settings(max_examples=400, deadline=None)
@given(placements())
def test_every_instruction_finds_what_one_machine_would_give_it(case) -> None:
    problem, placement = case
    if proposal(problem, placement) is not placement:
        return  # it holds state in a way that this placement cannot keep: test_validate is about those
    check(problem, placement)


def check(problem: Problem, placement: Placement) -> None:
    graph, split = problem.graph, placement.split
    shards = {s.server: range(s.start, s.stop) for s in split.shards} if split else {}
    moved = transfers(problem, placement)
    assert all(t.after < t.before for t in moved)
    seen = [(t.value, t.source, t.target, t.kind) for t in moved]
    assert len(seen) == len(set(seen)), "moved twice"

    def batched(v: int) -> bool:
        return split is not None and v in split.batch.axes

    def initial(v: int) -> Memory:
        return Memory({r: ("external", v, r) for r in rows_of(problem, placement, v)})

    one: dict[int, Memory] = {}  # the one machine
    servers: dict[int, dict[int, Memory]] = defaultdict(dict)
    client: dict[int, Memory] = {}
    for node in graph.externals:
        v = node.outputs[0]
        one[v], client[v] = initial(v), initial(v)
        where = problem.where[v]
        for server in where.servers:
            servers[server][v] = initial(v)
        for shard in where.shards:
            servers[shard.server][v] = Memory({r: ("external", v, r) for r in range(shard.start, shard.stop)})
    under_way: dict[int, list] = defaultdict(list)
    for number in range(-1, len(graph.nodes)):
        if number >= 0:
            node = graph.nodes[number]
            for target, v, content in under_way.pop(number, ()):
                servers[target].setdefault(v, Memory()).update(content)
            expected = {v: dict(one[v]) for v in node.inputs}
            for server in placement.servers[number]:
                parallel = split is not None and len(placement.servers[number]) > 1
                rows = shards[server] if parallel else range(ROWS)
                have = servers[server]
                for v in node.inputs:
                    for r in rows if batched(v) else [None]:
                        assert have[v][r] == expected[v][r], f"%{v} row {r} before {number} on {server}"
                run(node, {v: have[v] for v in node.inputs}, rows, batched, have)
            run(node, {v: one[v] for v in node.inputs}, range(ROWS), batched, one)
        for t in moved:
            if t.after == number:
                source = client[t.value] if t.source == CLIENT else servers[t.source][t.value]
                wanted = {
                    "copy": rows_of(problem, placement, t.value),
                    "scatter": shards.get(t.target, ()),
                    "gather": shards.get(t.source, ()),
                }[t.kind]
                if t.kind == "copy" and not batched(t.value):
                    wanted = [None]
                under_way[t.before].append((t.target, t.value, {r: source[r] for r in wanted}))
    for v, where in locations(problem, placement).items():
        for server in where.servers:
            assert all(servers[server][v][r] == one[v][r] for r in rows_of(problem, placement, v))
        for shard in where.shards:
            assert all(servers[shard.server][v][r] == one[v][r] for r in range(shard.start, shard.stop))
    seconds, busy = predict(problem, placement, moved)
    assert seconds >= max(busy)
