"""How far predictions are from measurements."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import spearmanr

from genie.cost.families import FAMILIES, family
from genie.cost.fit import Sample
from genie.scheduler.cluster import CostModel


@dataclass(frozen=True)
class Row:
    label: str
    family: str
    measured_s: float
    predicted_s: float
    held_out: bool

    @property
    def error(self) -> float:
        """Predicted over measured, less 1."""
        return self.predicted_s / self.measured_s - 1


@dataclass(frozen=True)
class Judgement:
    """``mape``: mean of the absolute relative errors, in percent; ``spearman``: rank correlation of
    predicted and measured, None for fewer than three rows. ``by_family``: MAPE of each."""

    mape: float
    spearman: float | None
    by_family: dict[str, float]
    rows: tuple[Row, ...]


def judge(model: CostModel, samples: Iterable[Sample]) -> Judgement:
    """Judges on all ``samples`` that are given. Raises ValueError for none."""
    rows = []
    for s in samples:
        nodes = s.computing
        heaviest = max(nodes, key=lambda n: (n.cost.flops or 0, n.cost.nbytes))
        rows.append(Row(s.label, family(heaviest.name), s.seconds, sum(model.seconds(s.nodes)), s.held_out))
    return judgement(rows)


def judgement(rows: Sequence[Row]) -> Judgement:
    if not rows:
        raise ValueError("there is nothing to judge on: give at least one sample")
    by_family = {f: [abs(r.error) for r in rows if r.family == f] for f in FAMILIES}
    rank = None
    if len(rows) > 2:
        rank = float(spearmanr([r.measured_s for r in rows], [r.predicted_s for r in rows]).statistic)
    return Judgement(
        100 * float(np.mean([abs(r.error) for r in rows])),
        rank,
        {f: 100 * float(np.mean(errors)) for f, errors in by_family.items() if errors},
        tuple(rows),
    )
