"""``genie gate --against``: pairs of processes, the flagged cells again in fresh pairs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol

from genie.bench.gate.decision import Pair, Settings, check_pairs, judge, paired_estimates
from genie.bench.gate.matching import check_same_work, match
from genie.bench.gate.outcome import Outcome, Side, conclude, fingerprint_of, flagged


class MeasuresPairs(Protocol):
    """What runs the pairs: ``genie.bench.gate.pairs.PairRunner``."""

    def run(
        self, count: int, stage: Literal["first", "again"], cells: Sequence[str] | None = None
    ) -> list[Pair]:
        """``count`` pairs for stage "first" or "again"; only ``cells`` (ids) where they are given."""


def gate_against(runner: MeasuresPairs, count: int, settings: Settings, old: Side, new: Side) -> Outcome:
    """Measures and decides. Raises ConfigError below three pairs, CannotCompareError, ResultError.

    Counters are gated on the first stage, in which every process runs the same cells in the same order.
    """
    check_pairs(count)
    pairs = runner.run(count, "first")
    olds, news = [pair.old for pair in pairs], [pair.new for pair in pairs]
    matched = match(olds, news)
    first = judge(paired_estimates(pairs, matched.common), settings)
    cells = flagged(first)
    again = {}
    if cells:
        fresh = runner.run(count, "again", cells)
        there = [cell for cell in cells if all(cell in side.cells for p in fresh for side in (p.old, p.new))]
        check_same_work(olds, [result for pair in fresh for result in (pair.old, pair.new)], there)
        again = judge(paired_estimates(fresh, there), settings)
    return Outcome(
        mode="against",
        settings=settings,
        cells=conclude(matched, olds, news, first, again),
        old=old,
        new=new,
        fingerprint=fingerprint_of(olds),
    )
