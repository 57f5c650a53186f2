"""From measured samples to a model."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from genie.cost.families import Work, work
from genie.cost.model import DeviceModel, Group
from genie.srg.graph import Node

#: how far the interpolated correction may stay from a measurement: they are noisy (in the logarithm's square)
SMOOTHING = 0.02


@dataclass(frozen=True)
class Sample:
    """One measurement: ``nodes`` take ``seconds`` together. Only single nodes can be fitted; held-out
    samples never are."""

    label: str
    nodes: tuple[Node, ...]
    seconds: float
    dtype: str = "float32"
    held_out: bool = False

    @property
    def computing(self) -> tuple[Node, ...]:
        return tuple(n for n in self.nodes if not n.is_view)


def fit(device: str, samples: Iterable[Sample]) -> DeviceModel:
    """Raises ValueError where a dtype has no elementwise sample: everything unknown is predicted as one."""
    samples = list(samples)
    held_out = {(n.op, n.cost) for s in samples if s.held_out for n in s.computing}
    by_dtype: dict[str, dict[str, list[tuple[Work, float]]]] = {}
    for s in samples:
        nodes = s.computing
        # Whatever else measured a held-out op at its size must not teach it either.
        if s.held_out or len(nodes) != 1 or s.seconds <= 0 or (nodes[0].op, nodes[0].cost) in held_out:
            continue
        w = work(nodes[0].name, nodes[0].cost)
        groups = by_dtype.setdefault(s.dtype, {})
        groups.setdefault(w.groups[0], []).append((w, s.seconds))
        if w.groups[-1] == "elementwise" and w.groups[0] in ("elementwise add", "elementwise mul"):
            groups.setdefault("elementwise", []).append((w, s.seconds))
        elif len(w.groups) > 1 and w.groups[-1] in ("norm", "softmax", "gather", "reduction", "copy", "pool"):
            groups.setdefault(w.groups[-1], []).append((w, s.seconds))
    return DeviceModel(
        device,
        {
            dtype: {name: _group(found) for name, found in groups.items()}
            for dtype, groups in by_dtype.items()
        },
    )


def _group(found: Sequence[tuple[Work, float]]) -> Group:
    """The launch is that of the fastest sample; ceilings are the best that any sample reached."""
    launch = min(t for _, t in found)
    rate = max((w.flops / t for w, t in found), default=0.0)
    bandwidth = max(w.nbytes / t for w, t in found) or 1.0
    group = Group(launch, rate, bandwidth, [[0.0]], [0.0])
    return Group(
        launch,
        rate,
        bandwidth,
        [list(w.features) for w, _ in found],
        [math.log(t / group.roofline(w)) for w, t in found],
        SMOOTHING,
    )
