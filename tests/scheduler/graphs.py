"""Hand-made graphs, clusters and cost models whose times can be worked out on paper."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from genie.scheduler.cluster import Cluster, Device, Link
from genie.scheduler.plan import BatchAxes, BatchSplit, Placement
from genie.scheduler.problem import Problem
from genie.scheduler.where import Axis, Shard
from genie.srg.graph import Cost, Graph, Node, Origin, Phase, Residency
from genie.wire.messages import TensorSpec

MS = 1e-3
#: one value of a hand-made graph: 4 rows of 250 floats
BYTES = 4000


class Table:
    """``flops`` are microseconds; ``speed`` divides them. A share takes its part."""

    def __init__(self, speed: float = 1.0) -> None:
        self.speed = speed

    def seconds(self, nodes: Sequence[Node], share: float = 1.0) -> list[float]:
        return [0.0 if n.is_view else (n.cost.flops or 0) * 1e-6 * share / self.speed for n in nodes]


@dataclass
class Making:
    """Appends instructions; each returns the number of the value it makes (or changes)."""

    nodes: list[Node] = field(default_factory=list)
    externals: list[Node] = field(default_factory=list)
    values: int = 0

    def given(
        self, residency: Residency = Residency.EXTERNAL_INPUT, shape: tuple[int, ...] = (4, 250)
    ) -> int:
        v = -len(self.externals) - 1
        weight = residency is Residency.PERSISTENT_WEIGHT
        origin = Origin.PARAMETER if weight else Origin.HOST
        self.externals.append(
            Node(v, "genie::external", [], {}, (), (), (), (v,), (_spec(shape),), (), False, False,
                 Cost(0, 0), origin, residency=residency)
        )  # fmt: skip
        return v

    def weight(self, shape: tuple[int, ...] = (4, 250)) -> int:
        return self.given(Residency.PERSISTENT_WEIGHT, shape)

    def op(
        self, *inputs: int, us: int = 0, name: str = "aten::linear.default", view: bool = False,
        leaves: bool = False, writes: tuple[int, ...] = (), branch: int | None = None,
        phase: Phase = Phase.UNKNOWN, shape: tuple[int, ...] = (4, 250), stage: int | None = None,
        args: list | None = None, floats: tuple[float, ...] = (),
        residency: Residency = Residency.UNKNOWN,
    ) -> int:  # fmt: skip
        outputs = () if writes else (self.values,)
        self.values += len(outputs)
        number = len(self.nodes)
        args = [["t"] for _ in inputs] if args is None else args
        self.nodes.append(
            Node(number, name, args, {}, inputs, (), floats, outputs, (_spec(shape),) * len(outputs), writes,
                 view, leaves, Cost(us, BYTES), phase=phase, branch=branch, stage=stage,
                 residency=residency)
        )  # fmt: skip
        return writes[0] if writes else outputs[0]

    def view(self, of: int, **more: object) -> int:
        return self.op(of, name="aten::view.default", view=True, **more)  # type: ignore[arg-type]

    def add(self, of: int, **more: object) -> int:
        """In place."""
        return self.op(of, name="aten::relu_.default", writes=(of,), **more)  # type: ignore[arg-type]

    def graph(self) -> Graph:
        return Graph(self.externals, self.nodes, b"hand-made")

    def problem(self, cluster: Cluster | None = None, **more: object) -> Problem:
        return Problem(self.graph(), cluster or pool(), **{"where": {}} | more)  # type: ignore[arg-type]


def _spec(shape: tuple[int, ...]) -> TensorSpec:
    stride = [1]
    for size in reversed(shape[1:]):
        stride.insert(0, stride[0] * size)
    return TensorSpec("float32", list(shape), stride)


def pool(
    *speeds: float, limits: Sequence[int] = (), held: Sequence[int] = (), busy: Sequence[float] = (),
    peer: bool = True, free: bool = True,
) -> Cluster:  # fmt: skip
    """Servers of these speeds (two equal ones by default). Links: 1 ms round trip, 1 MB/s to the client and
    4 MB/s between servers, so that a hand-made value takes 4.5 ms and 1.5 ms. ``free``: without overheads."""
    speeds = speeds or (1.0, 1.0)
    devices = tuple(
        Device(k, f"device{k}", Table(s), Link(1 * MS, 1e6), limits[k] if limits else 0,
               held[k] if held else 0, busy[k] if busy else 0.0)
        for k, s in enumerate(speeds)
    )  # fmt: skip
    overheads = (0.0, 0.0, float("inf")) if free else (0.1 * MS, 0.2 * MS, 4e6)
    return Cluster(devices, Link(1 * MS, 4e6) if peer else None, 0, *overheads)


def placed(servers: Sequence[int | tuple[int, ...]], split: BatchSplit | None = None) -> Placement:
    return Placement("mine", tuple(s if isinstance(s, tuple) else (s,) for s in servers), "a test", split)


def rows_split(graph: Graph, whole: Sequence[int] = (), rows: Sequence[int] = (2, 2)) -> BatchSplit:
    """Dimension 0 of every value but weights and ``whole`` is the batch of 4."""
    weights = {n.outputs[0] for n in graph.externals if n.residency is Residency.PERSISTENT_WEIGHT}
    axes = {v: Axis(0) for n in (*graph.externals, *graph.nodes) for v in n.outputs}
    for v in (*weights, *whole):
        axes.pop(v, None)
    shards, at = [], 0
    for server, count in enumerate(rows):
        shards.append(Shard(server, at, at + count))
        at += count
    return BatchSplit(BatchAxes(at, axes, {}), tuple(shards))
