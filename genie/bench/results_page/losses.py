"""Where genie_full is slower than another row of the same run: found, and not chosen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from genie.bench.report.facts import Facts, case_ratio

FULL = "genie_full"
#: what genie_full is to beat
RIVALS = ("local_pytorch", "local_compiled", "pytorch_rpc", "ray")


@dataclass(frozen=True)
class Loss:
    """``ratio``: time of genie_full over the rival's, above 1. Devices as each used them."""

    group: str
    rival: str
    ratio: float
    full: Facts
    other: Facts


def losses(workloads: Sequence[tuple[str, Sequence[Facts]]]) -> list[Loss]:
    """Of every group that has genie_full with all its features, the largest ratio of a group first."""
    found = []
    for group, cells in workloads:
        rows = {facts.cell.label: facts for facts in cells}
        full = rows.get(FULL)
        if full is None:
            continue
        beaten = []
        for rival in RIVALS:
            ratio = case_ratio(full, rows[rival]) if rival in rows else None
            if ratio is not None and ratio > 1:
                beaten.append(Loss(group, rival, ratio, full, rows[rival]))
        found += sorted(beaten, key=lambda loss: -loss.ratio)
    return found


def missing(workloads: Sequence[tuple[str, Sequence[Facts]]]) -> list[tuple[str, str]]:
    """Groups with the rows, among genie_full and its rivals, that the run lacks there."""
    gaps = []
    for group, cells in workloads:
        labels = {facts.cell.label for facts in cells}
        absent = [name for name in (FULL, *RIVALS) if name not in labels]
        if absent:
            gaps.append((group, ", ".join(absent)))
    return gaps
