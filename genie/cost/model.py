"""What nodes cost on one device: a roofline with measured ceilings, and measured inefficiencies by size.

For each dtype and group of ops (see `genie.cost.families`)

    seconds = (launch + max(flops / rate, bytes / bandwidth)) * exp(g(sizes))

with the highest rate and bandwidth that any measurement of the group reached, and g interpolated in
the logarithms of the sizes (`genie.cost.surface`).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np

from genie.cost.families import Work, work
from genie.cost.surface import Surface
from genie.srg.graph import Cost, Node, itemsize

#: of the stored form, and of what a measurement means: a file of another one is measured anew
FORMAT = 1

logger = logging.getLogger(__name__)


class Group(msgspec.Struct, frozen=True):
    """Ops that cost alike. ``launch_s``: of the smallest; ``rate`` in FLOP/s (0: never bound by it) and
    ``bandwidth`` in bytes/s are ceilings. ``points`` are logarithms of sizes, ``excess`` the logarithm of
    measured over roofline seconds at each. ``smoothing``: of the interpolation, 0 for none."""

    launch_s: float
    rate: float
    bandwidth: float
    points: list[list[float]]
    excess: list[float]
    smoothing: float = 0.0

    def roofline(self, w: Work) -> float:
        """Seconds at the ceilings, with the launch."""
        compute = w.flops / self.rate if self.rate else 0.0
        return self.launch_s + max(compute, w.nbytes / self.bandwidth)


class Stored(msgspec.Struct, frozen=True):
    """The JSON form. ``key``: see `genie.cost.store`. ``measured``: how far the fit was from its
    measurements, and from the held-out ones; for people."""

    format: int
    device: str
    key: dict[str, Any]
    dtypes: dict[str, dict[str, Group]]
    measured: dict[str, Any] = {}


@dataclass
class DeviceModel:
    """The cost model of one device. ``groups``: by dtype, then by name. Never empty."""

    device: str
    groups: Mapping[str, Mapping[str, Group]]
    key: dict[str, Any] = field(default_factory=dict)
    measured: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.groups or any("elementwise" not in g for g in self.groups.values()):
            raise ValueError("a cost model needs a dtype, and elementwise ops measured in it")
        self._surfaces: dict[tuple[str, str], Surface] = {}
        self._known: dict[tuple[str, Cost, float], float] = {}
        self.substituted: dict[str, str] = {}  # dtype without measurements -> the one it is scaled from

    def seconds(self, nodes: Sequence[Node], share: float = 1.0) -> list[float]:
        """See `genie.scheduler.cluster.CostModel`. A dtype that was not measured is scaled from one that
        was, by the ratio of their sizes (`substituted` names it, and a warning is logged once)."""
        known, missing = self._known, {}
        keys = [(n.op, n.cost, share) for n in nodes]
        for key, node in zip(keys, nodes, strict=True):
            if key not in known:
                missing[key] = node
        if missing:
            self._add(missing, share)
        return [known[key] for key in keys]

    def _add(self, missing: dict[tuple[str, Cost, float], Node], share: float) -> None:
        """Predicts all new keys, group by group: one call of the interpolation for each."""
        if len(self._known) > 200_000:  # a long-lived process with growing caches
            self._known.clear()
        batches: dict[tuple[str, str], list[tuple[Any, Work, float]]] = {}
        for key, node in missing.items():
            if node.is_view or node.op.startswith("genie::"):
                self._known[key] = 0.0
                continue
            dtype, scale = self._measured_dtype(node.cost.dtype)
            cost = node.cost
            if scale != 1.0:  # as many elements of the measured dtype
                cost = msgspec.structs.replace(cost, dtype=dtype, nbytes=round(cost.nbytes / scale))
            w = work(node.name, cost, share)
            groups = self.groups[dtype]
            name = next((g for g in w.groups if g in groups), "elementwise")
            if len(groups[name].points[0]) != len(w.features):
                name = "elementwise"
            batches.setdefault((dtype, name), []).append((key, w, scale))
        for (dtype, name), found in batches.items():
            group = self.groups[dtype][name]
            points = np.array([w.features[: len(group.points[0])] for _, w, _ in found])
            factors = np.exp(self._surface(dtype, name)(points))
            for (key, w, scale), factor in zip(found, factors.tolist(), strict=True):
                self._known[key] = group.roofline(w) * factor * scale

    def _surface(self, dtype: str, name: str) -> Surface:
        surface = self._surfaces.get((dtype, name))
        if surface is None:
            g = self.groups[dtype][name]
            surface = self._surfaces[dtype, name] = Surface(g.points, g.excess, g.smoothing)
        return surface

    def _measured_dtype(self, dtype: str) -> tuple[str, float]:
        """A measured dtype, and what its seconds are to be multiplied with."""
        if dtype in self.groups:
            return dtype, 1.0
        source = self.substituted.get(dtype)
        if source is None:
            source = "float32" if "float32" in self.groups else next(iter(self.groups))
            self.substituted[dtype] = source
            if "float" in dtype:
                logger.warning(
                    "%s was not calibrated in %s: predictions are those in %s, scaled by the size of an "
                    "element",
                    self.device, dtype, source,
                )  # fmt: skip
        return source, itemsize(dtype) / itemsize(source)

    def to_json(self) -> bytes:
        groups = {dtype: dict(g) for dtype, g in self.groups.items()}
        return msgspec.json.format(
            msgspec.json.encode(Stored(FORMAT, self.device, self.key, groups, self.measured)), indent=1
        )

    @classmethod
    def from_json(cls, data: bytes) -> DeviceModel:
        """Raises ValueError for what is no cost model of this format."""
        stored = msgspec.json.decode(data, type=Stored)
        if stored.format != FORMAT:
            raise ValueError(f"a cost model of format {stored.format}; this version reads format {FORMAT}")
        for groups in stored.dtypes.values():
            for name, g in groups.items():
                numbers = (g.launch_s, g.rate, g.bandwidth, *g.excess, *(x for p in g.points for x in p))
                if not all(map(math.isfinite, numbers)) or g.bandwidth <= 0 or g.launch_s < 0 or g.rate < 0:
                    raise ValueError(f"group {name!r} has a ceiling that is none")
                if not g.points or len(g.points) != len(g.excess) or len({len(p) for p in g.points}) != 1:
                    raise ValueError(f"group {name!r} has measurements that do not fit together")
        return cls(stored.device, stored.dtypes, stored.key, stored.measured)


def family_of_group(name: str) -> str:
    """The family that a report counts a group to."""
    head = name.partition(" ")[0]
    return "matmul" if head in ("linear", "bmm") else head
