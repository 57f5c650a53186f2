"""Which cells became slower: a one-sided t bound on a log-ratio, Holm-corrected over all cells.

Log-ratios are log(new / old): above 0 is slower. A cell is *flagged* when both hold:

- it is slower: H0 "its mean is at most 0" is rejected at the familywise level ``alpha``, that is, the
  one-sided bound of its ratio (adjusted for the number of cells) lies above 1;
- by enough to matter: its mean is above log(1 + floor), the practical floor.

The mirror of both tells what became faster.

Sources: Student, "The probable error of a mean", Biometrika 6 (1908); S. Holm, "A simple sequentially
rejective multiple test procedure", Scandinavian Journal of Statistics 6 (1979); the smallest detectable
effect is H. S. Bloom, "Minimum detectable effects", Evaluation Review 19 (1995).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median, stdev

from genie.bench.results import CellResult, Result
from genie.errors import CannotCompareError, ConfigError, ResultError

#: two pairs estimate their own spread with one degree of freedom: no bound that is worth its name
LEAST_PAIRS = 3
#: the share of real slow-downs of the told size that would be flagged
POWER = 0.9
#: a spread below this is rounding, not noise: the log-ratios are one and the same number
_CONSTANT = 1e-12
_MOST_LOG = 700.0


@dataclass(frozen=True)
class Pair:
    """Two runs measured side by side, each in a process (and servers) of its own."""

    old: Result
    new: Result


@dataclass(frozen=True)
class Settings:
    """``floor``: measured slow-downs up to this share are accepted. ``alpha``: familywise level of a stage.

    A false alarm has to pass two stages of independent pairs, so its probability is at most alpha squared.
    """

    floor: float = 0.05
    alpha: float = 0.1
    accept_counters: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.floor < 10:
            raise ConfigError(f"a floor of {100 * self.floor:g} % is out of range: give --floor 0 to 1000")
        if not 0 < self.alpha < 0.5:
            raise ConfigError(f"alpha {self.alpha:g} is out of range: give --alpha between 0 and 0.5")


@dataclass(frozen=True)
class Estimate:
    """A cell's log-ratio, its standard error with ``df`` degrees of freedom, and how many runs it is from."""

    mean: float
    error: float
    df: float
    samples: int


@dataclass(frozen=True)
class Judgement:
    """What one stage says of one cell.

    ``lower`` and ``upper`` are one-sided bounds of the ratio at level 1 - alpha, of this cell alone.
    ``detectable`` is the smallest true ratio that is flagged with probability 0.9 at the strictest of
    Holm's levels (alpha / cells); None where the samples have no spread to tell it from.
    ``p_slower`` and ``p_faster`` are Holm-adjusted over the cells of the stage.
    """

    ratio: float
    lower: float
    upper: float
    detectable: float | None
    p_slower: float
    p_faster: float
    slower: bool
    faster: bool
    samples: int


def log_ratio(old: CellResult, new: CellResult) -> float:
    """log(new / old) of the medians; over several cases the median of their log-ratios.

    Raises CannotCompareError where no case is in both.
    """
    common = [case for case in old.cases if case in new.cases]
    if not common:
        raise CannotCompareError(f"{old.id}: the two runs have no case in common: measure one of them again")
    return median(log_of(new.cases[case], new) - log_of(old.cases[case], old) for case in common)


def matched_log_ratio(old: CellResult, new: CellResult) -> float:
    """log(new / old) of one pair of processes that took turns: the median over rounds of the log-ratio.

    Round k of both sides has the same input and was measured within the same second, so that what the
    machine did meanwhile cancels; the ratio of the two medians over all rounds has 1.2 to 1.8 times its
    spread on a shared machine (docs/measured-gate.md). Where rounds cannot be matched (several cases, a
    side without raw rounds or with more of them) it is `log_ratio`.
    """
    rounds = list(zip(old.samples_s, new.samples_s, strict=False))
    if not rounds or len(old.samples_s) != len(new.samples_s) or len(old.cases) > 1:
        return log_ratio(old, new)
    return median(log_of(after, new) - log_of(before, old) for before, after in rounds)


def log_of(seconds: float, cell: CellResult) -> float:
    """Natural logarithm of a measured time. Raises ResultError for what no clock can have measured."""
    if not (seconds > 0 and math.isfinite(seconds)):
        raise ResultError(
            f"{cell.id}: {seconds} s is no measured time: the file is damaged; run the suite again"
        )
    return math.log(seconds)


def paired_estimate(log_ratios: Sequence[float]) -> Estimate:
    """Mean and standard error over pairs of processes."""
    count = len(log_ratios)
    return Estimate(fmean(log_ratios), stdev(log_ratios) / math.sqrt(count), count - 1, count)


def check_pairs(count: int) -> None:
    """Raises ConfigError below three pairs."""
    if count < LEAST_PAIRS:
        raise ConfigError(
            f"{count} pairs of processes cannot tell noise from a slow-down: "
            f"give --pairs {LEAST_PAIRS} or more"
        )


def paired_estimates(pairs: Sequence[Pair], cells: Collection[str]) -> dict[str, Estimate]:
    """By cell, from the pairs in which both sides have it; raises ConfigError below three pairs.

    A cell that fewer than three pairs have is left out: the caller reports it as missing.
    """
    check_pairs(len(pairs))
    estimates = {}
    for cell in cells:
        ratios = [
            matched_log_ratio(pair.old.cells[cell], pair.new.cells[cell])
            for pair in pairs
            if cell in pair.old.cells and cell in pair.new.cells
        ]
        if len(ratios) >= LEAST_PAIRS:
            estimates[cell] = paired_estimate(ratios)
    return estimates


def judge(estimates: Mapping[str, Estimate], settings: Settings) -> dict[str, Judgement]:
    """Both tests of every cell, each family Holm-corrected on its own."""
    limit = math.log1p(settings.floor)
    slower = holm({cell: _p_above_zero(one) for cell, one in estimates.items()})
    faster = holm({cell: _p_above_zero(_mirrored(one)) for cell, one in estimates.items()})
    return {
        cell: Judgement(
            ratio=_exp(one.mean),
            lower=_exp(one.mean - _quantile(1 - settings.alpha, one.df) * one.error),
            upper=_exp(one.mean + _quantile(1 - settings.alpha, one.df) * one.error),
            detectable=_detectable(one, limit, settings.alpha / len(estimates)),
            p_slower=slower[cell],
            p_faster=faster[cell],
            slower=slower[cell] <= settings.alpha and one.mean > limit + _CONSTANT,
            faster=faster[cell] <= settings.alpha and -one.mean > limit + _CONSTANT,
            samples=one.samples,
        )
        for cell, one in estimates.items()
    }


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Adjusted p-values: reject those at most alpha, and the familywise error is at most alpha."""
    adjusted: dict[str, float] = {}
    worst = 0.0
    for rank, name in enumerate(sorted(p_values, key=lambda name: p_values[name])):
        worst = max(worst, min(1.0, (len(p_values) - rank) * p_values[name]))
        adjusted[name] = worst
    return {name: adjusted[name] for name in p_values}


def _mirrored(estimate: Estimate) -> Estimate:
    return Estimate(-estimate.mean, estimate.error, estimate.df, estimate.samples)


def _p_above_zero(estimate: Estimate) -> float:
    """p of "the mean is at most 0". Without any spread the mean itself decides."""
    # Imported where it is used: `genie --help` must not wait for it.
    from scipy.special import stdtr

    if estimate.error <= _CONSTANT:
        return 0.0 if estimate.mean > _CONSTANT else 1.0
    return float(stdtr(estimate.df, -estimate.mean / estimate.error))


def _quantile(level: float, df: float) -> float:
    from scipy.special import stdtrit

    return float(stdtrit(df, level))


def _detectable(estimate: Estimate, limit: float, level: float) -> float | None:
    if estimate.error <= _CONSTANT:
        return None
    # Enough for the test, and enough for the floor, with the given probability.
    needed = max(_quantile(1 - level, estimate.df) * estimate.error, limit)
    return _exp(needed + _quantile(POWER, estimate.df) * estimate.error)


def _exp(log_ratio: float) -> float:
    """Bounds of few and wild samples lie beyond what a float can hold; these stand for "no bound at all"."""
    return math.exp(min(max(log_ratio, -_MOST_LOG), _MOST_LOG))
