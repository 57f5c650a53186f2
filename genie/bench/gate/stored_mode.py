"""``genie gate --stored``: stored runs against a given run, or against one that is measured now."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

from genie.bench.gate.decision import Judgement, Settings, judge
from genie.bench.gate.matching import check_same_work, match
from genie.bench.gate.outcome import Outcome, Side, conclude, fingerprint_of, flagged
from genie.bench.gate.stored import NOTE, reference_cells, stored_estimates
from genie.bench.gate.suite_run import measure_like
from genie.bench.results import Result, load_result

#: fresh processes for the cells that were flagged: enough to see the spread between processes
AGAIN_RUNS = 3
#: (stored run to measure like, file to write, ids or None for all cells) -> the run
Measure = Callable[[Result, Path, Collection[str] | None], Result]


def gate_stored(
    stored: Sequence[Path],
    current: Path | None,
    settings: Settings,
    folder: Path,
    measure: Measure = measure_like,
) -> Outcome:
    """Decides. Runs that are measured now are written into ``folder``.

    Raises ResultError and CannotCompareError for what cannot be read or compared.
    """
    old = [load_result(path) for path in stored]
    new = [load_result(current) if current else measure(old[0], folder / "current.json", None)]
    matched = match(old, new)
    first = judge(stored_estimates(old, new, matched.common), settings)
    again = None if current else _again(old, flagged(first), settings, folder, measure)
    return Outcome(
        mode="stored",
        settings=settings,
        cells=conclude(matched, old, new, first, again, _references(old)),
        old=_side(old),
        new=_side(new),
        fingerprint=fingerprint_of(old),
        note=NOTE,
    )


def _again(
    old: Sequence[Result], cells: Collection[str], settings: Settings, folder: Path, measure: Measure
) -> Mapping[str, Judgement]:
    """The flagged cells and their references in fresh processes, judged by these alone."""
    if not cells:
        return {}
    groups = {cell.group for result in old for cell in result.cells.values() if cell.id in cells}
    references = {group: cell for result in old for group, cell in reference_cells(result).items()}
    ids = [*cells, *(references[group] for group in sorted(groups) if group in references)]
    fresh = [measure(old[0], folder / f"again-{number}.json", ids) for number in range(1, AGAIN_RUNS + 1)]
    there = [cell for cell in cells if all(cell in result.cells for result in fresh)]
    check_same_work(old, fresh, there)
    return judge(stored_estimates(old, fresh, there), settings)


def _references(results: Sequence[Result]) -> frozenset[str]:
    return frozenset(cell for result in results for cell in reference_cells(result).values())


def _side(results: Sequence[Result]) -> Side:
    first = results[0]
    names = ", ".join(result.path.name for result in results)
    return Side(names, commit=first.commit, dirty=first.dirty, runs=len(results))
