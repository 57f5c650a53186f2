"""Against stored runs: ratios to ``local_pytorch`` of the same run, so that a machine's drift cancels.

Weaker than pairs of processes, and it says so. Of a single run only its rounds are known, and they share
one process: how memory was laid out, which cores it got and what else ran is the same for all of them, so
the bound is narrower than the truth. Several stored runs (or the fresh runs of a flagged cell) show the
spread between processes, and then the bound rests on that.

Per cell, with r = log(median / median of its reference): x = mean r (new) - mean r (old).

- Three runs or more with spare degrees of freedom (k - 1 per side, two in all): Student's two-sample t with
  the pooled variance of r between runs.
- Otherwise from the rounds: a median's variance is about (pi / 2) s^2 / n for log times of variance s^2
  (Stuart and Ord, Kendall's Advanced Theory of Statistics, vol. 1, ch. 10; too wide for small n, never too
  narrow for normal ones), summed over the runs and their references, with degrees of freedom after
  B. L. Welch, "The generalization of Student's problem", Biometrika 34 (1947), and F. E. Satterthwaite,
  Biometrics Bulletin 2 (1946).

Over several cases (the microbenchmark) r is the median over cases, the rounds are sums over cases, and the
spread between cases is added to the variance.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median, stdev, variance

from genie.bench.gate.decision import Estimate, log_of
from genie.bench.results import CellResult, Result
from genie.errors import CannotCompareError, ResultError

LOCAL = "local_pytorch"
NOTE = (
    "Against stored runs: weaker than --against, because the noise between processes is seen only where "
    "several runs are given, and because the two sides were measured at different times."
)
#: this many degrees of freedom between runs are better evidence than the rounds within them
_ENOUGH_BETWEEN_RUNS = 2


@dataclass(frozen=True)
class _Term:
    """One independent part of a variance."""

    variance: float
    df: float


def reference_cells(result: Result) -> dict[str, str]:
    """By group the id of its ``local_pytorch`` cell, which is the unit there and is not judged itself."""
    return {cell.group: cell.id for cell in result.cells.values() if cell.label == LOCAL}


def stored_estimates(
    old: Sequence[Result], new: Sequence[Result], cells: Collection[str]
) -> dict[str, Estimate]:
    """By cell; the references themselves are left out.

    Raises CannotCompareError for a cell whose run has no reference, ResultError for a run that was saved
    without its rounds.
    """
    sides = [[(result, reference_cells(result)) for result in results] for results in (old, new)]
    estimates = {}
    for cell in cells:
        runs = [
            [_relative(result, references, cell) for result, references in side if cell in result.cells]
            for side in sides
        ]
        if all(run.label != LOCAL for side in runs for run in side):
            estimates[cell] = _estimate(*runs)
    return estimates


@dataclass(frozen=True)
class _Relative:
    """One run of a cell: log ratios to its reference by case, and the variance that its rounds tell."""

    label: str
    log_ratios: Mapping[str, float]
    terms: tuple[_Term, ...]


def _relative(result: Result, references: Mapping[str, str], cell_id: str) -> _Relative:
    cell = result.cells[cell_id]
    if cell.label == LOCAL:
        return _Relative(LOCAL, {}, ())
    times, rounds = _reference(result, references, cell)
    common = [case for case in cell.cases if case in times]
    if not common:
        raise CannotCompareError(
            f"{result.path}: {cell.id} has no case in common with {LOCAL}: run the suite again"
        )
    return _Relative(
        cell.label,
        {case: log_of(cell.cases[case], cell) - log_of(times[case], cell) for case in common},
        (_median_term(cell.samples_s, cell, result), _median_term(rounds, cell, result)),
    )


def _reference(
    result: Result, references: Mapping[str, str], cell: CellResult
) -> tuple[Mapping[str, float], Sequence[float]]:
    """Medians by case, and rounds: of ``local_pytorch`` in the group, of a link's raw socket, or of the
    eager PyTorch that took turns with the client."""
    for beside, key in (("link", "raw_s"), ("client_cost", "eager_rounds_s")):
        if beside not in cell.info:
            continue
        rounds = cell.info[beside].get(key) or ()
        return {"": median(rounds)} if rounds else {}, rounds
    if cell.group not in references:
        raise CannotCompareError(
            f"{result.path} has no {LOCAL} for {cell.group}, so {cell.label} has nothing to be a ratio of: "
            f"run the suite with {LOCAL} among --genie-baselines"
        )
    local = result.cells[references[cell.group]]
    return local.cases, local.samples_s


def _median_term(rounds: Sequence[float], cell: CellResult, result: Result) -> _Term:
    if not rounds:
        raise ResultError(
            f"{result.path}: {cell.id} was saved without its rounds: store runs with --benchmark-json FILE, "
            "--benchmark-autosave or --benchmark-save-data"
        )
    if len(rounds) < 2:
        raise ResultError(
            f"{result.path}: {cell.id} has one round, which has no spread: run with --genie-rounds 3 or more"
        )
    spread = variance(log_of(seconds, cell) for seconds in rounds)
    return _Term(math.pi / 2 * spread / len(rounds), len(rounds) - 1)


def _estimate(old: Sequence[_Relative], new: Sequence[_Relative]) -> Estimate:
    cases = [case for case in old[0].log_ratios if all(case in run.log_ratios for run in (*old[1:], *new))]
    if not cases:
        raise CannotCompareError(f"{old[0].label}: its runs have no case in common: measure it again")
    centre = {case: fmean(run.log_ratios[case] for run in old) for case in cases}
    # One number a run: how far it is from the old side's mean, in the middle of its cases.
    olds, news = (
        [median(run.log_ratios[case] - centre[case] for case in cases) for run in side] for side in (old, new)
    )
    mean = fmean(news) - fmean(olds)
    runs = len(old) + len(new)
    between = runs - 2
    if between >= _ENOUGH_BETWEEN_RUNS:
        squares = sum(variance(side) * (len(side) - 1) for side in (olds, news) if len(side) > 1)
        error = math.sqrt(squares / between * (1 / len(old) + 1 / len(new)))
        return Estimate(mean, error, between, runs)
    terms = [
        _Term(term.variance / len(side) ** 2, term.df)
        for side in (old, new)
        for run in side
        for term in run.terms
    ]
    if len(cases) > 1:
        shifts = [fmean(run.log_ratios[case] for run in new) - centre[case] for case in cases]
        terms.append(_Term(math.pi / 2 * stdev(shifts) ** 2 / len(cases), len(cases) - 1))
    return Estimate(mean, *_welch(terms), runs)


def _welch(terms: Sequence[_Term]) -> tuple[float, float]:
    """Standard error of a sum of independent parts, and its degrees of freedom."""
    total = sum(term.variance for term in terms)
    if total == 0:
        return 0.0, min(term.df for term in terms)
    return math.sqrt(total), total**2 / sum(term.variance**2 / term.df for term in terms)
