"""How often the gate is wrong, from recorded processes: false alarms (A/A) and detections (A/B).

Each recorded *step* is three processes: A and A' of the same code, and B with a slow-down, which take turns
in this order and back; A/B is A' against B, neighbours as the two sides of a gate run are. Gate runs are
drawn from the steps without replacement: some for the first stage, others for the confirmation of what
the first stage flagged, and they are decided by the gate's own functions. A decision is one cell of one
gate run, and it is an alarm when the cell is flagged and confirmed.

Drawn gate runs share steps, so their decisions are not independent: the bounds are as if they were, and
``disjoint_runs`` says how many gate runs the steps would have made without sharing.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from math import exp
from statistics import fmean

from genie.bench.gate.decision import LEAST_PAIRS, Pair, Settings, judge, matched_log_ratio, paired_estimates
from genie.bench.gate.outcome import flagged
from genie.bench.results import Result
from genie.errors import ConfigError

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Step:
    """Three processes measured together. ``added``: by cell of B, the share of its time that was added."""

    a: Result
    same: Result
    slow: Result
    added: Mapping[str, float]


@dataclass(frozen=True)
class Rate:
    """``count`` of ``decisions``, with the exact (Clopper-Pearson) one-sided bounds of the true rate."""

    count: int
    decisions: int
    low: float
    high: float

    @property
    def rate(self) -> float:
        return self.count / self.decisions if self.decisions else 0.0


@dataclass(frozen=True)
class SlowCell:
    """A slow cell: share added (measured where it was added), ratio B / A as the gate sees it, detections."""

    id: str
    added: float
    ratio: float
    detected: Rate


@dataclass(frozen=True)
class Power:
    """What the recorded steps say. ``others`` are false alarms in the A/B runs' cells without slow-down.

    ``detected_runs`` counts gate runs of A/B in which any of the slow cells failed; ``alarmed_runs``
    those of A/A in which any cell did.
    """

    steps: int
    pairs: int
    again: int
    disjoint_runs: int
    false_alarms: Rate
    alarmed_runs: Rate
    flagged_first: Rate
    slow_cells: tuple[SlowCell, ...]
    detected: Rate
    detected_runs: Rate
    others: Rate


def power(steps: Sequence[Step], pairs: int, settings: Settings, runs: int, seed: int = 0) -> Power:
    """``runs`` gate runs each of A/A and A/B, of ``pairs`` pairs a stage, drawn with ``seed``.

    Where fewer than twice ``pairs`` steps were recorded, the confirmation takes those that are left.
    Raises ConfigError when these are too few.
    """
    again = min(pairs, len(steps) - pairs)
    if pairs < LEAST_PAIRS or again < LEAST_PAIRS:
        raise ConfigError(
            f"{len(steps)} steps are too few for gate runs of {pairs} pairs and {LEAST_PAIRS} more to "
            f"confirm with: measure more (--steps {2 * max(pairs, LEAST_PAIRS)}), or give fewer --pairs"
        )
    cells = [cell for cell in steps[0].a.cells if all(cell in _all_cells(step) for step in steps)]
    slow = sorted({cell for step in steps for cell in step.added} & set(cells))
    same_pairs = [Pair(step.a, step.same) for step in steps]
    slow_pairs = [Pair(step.same, step.slow) for step in steps]
    alarms, first_alarms, alarmed = 0, 0, 0
    hits = dict.fromkeys(slow, 0)
    detected_runs, other_alarms = 0, 0
    draw = random.Random(seed)
    for _ in range(runs):
        drawn = draw.sample(range(len(steps)), pairs + again)
        first, failed = _gate(same_pairs, drawn[:pairs], drawn[pairs:], cells, settings)
        first_alarms += len(first)
        alarms += len(failed)
        alarmed += bool(failed)
        _, failed = _gate(slow_pairs, drawn[:pairs], drawn[pairs:], cells, settings)
        for cell in slow:
            hits[cell] += cell in failed
        detected_runs += any(cell in failed for cell in slow)
        other_alarms += sum(cell not in hits for cell in failed)
    return Power(
        steps=len(steps),
        pairs=pairs,
        again=again,
        disjoint_runs=len(steps) // (pairs + again),
        false_alarms=rate(alarms, runs * len(cells)),
        alarmed_runs=rate(alarmed, runs),
        flagged_first=rate(first_alarms, runs * len(cells)),
        slow_cells=tuple(
            SlowCell(
                cell,
                added=fmean(step.added[cell] for step in steps if cell in step.added),
                ratio=exp(
                    fmean(
                        matched_log_ratio(pair.old.cells[cell], pair.new.cells[cell]) for pair in slow_pairs
                    )
                ),
                detected=rate(hits[cell], runs),
            )
            for cell in slow
        ),
        detected=rate(sum(hits.values()), runs * len(slow)),
        detected_runs=rate(detected_runs, runs if slow else 0),
        others=rate(other_alarms, runs * (len(cells) - len(slow))),
    )


def rate(count: int, decisions: int) -> Rate:
    """With one-sided bounds at CONFIDENCE each; 0 to 1 where nothing was decided."""
    if not decisions:
        return Rate(0, 0, 0.0, 1.0)
    from scipy import stats

    low = stats.binomtest(count, decisions, alternative="greater").proportion_ci(CONFIDENCE, "exact").low
    high = stats.binomtest(count, decisions, alternative="less").proportion_ci(CONFIDENCE, "exact").high
    return Rate(count, decisions, float(low), float(high))


def _gate(
    pairs: Sequence[Pair],
    first: Sequence[int],
    again: Sequence[int],
    cells: Collection[str],
    settings: Settings,
) -> tuple[Collection[str], Collection[str]]:
    """Cells that one gate run flags at first, and those of them that it confirms."""
    suspects = flagged(judge(paired_estimates([pairs[k] for k in first], cells), settings))
    if not suspects:
        return suspects, ()
    fresh = paired_estimates([pairs[k] for k in again], suspects)
    return suspects, flagged(judge(fresh, settings))


def _all_cells(step: Step) -> set[str]:
    """Those that all three processes have."""
    return step.a.cells.keys() & step.same.cells.keys() & step.slow.cells.keys()
