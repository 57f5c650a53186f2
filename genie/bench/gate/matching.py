"""Which cells two sides have in common, and whether they may be compared at all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from genie.bench.fingerprint import cell_differences
from genie.bench.results import CellResult, Result
from genie.errors import CannotCompareError

#: told of one difference: this many of its cells by name
_NAMED = 3


@dataclass(frozen=True)
class Matched:
    """Cells by id, in the order of the files.

    ``common`` are in every run of the new side and in some of the old one: they are judged.
    ``missing`` tells why a cell that the old side has cannot be judged; ``added`` are new.
    """

    common: tuple[str, ...]
    missing: Mapping[str, str]
    added: tuple[str, ...]


def match(old: Sequence[Result], new: Sequence[Result]) -> Matched:
    """Raises CannotCompareError when nothing is common, or when common cells are not of the same work."""
    had, has = first_cells(old), first_cells(new)
    common = [cell for cell in had if cell in has]
    if not common:
        raise CannotCompareError(
            f"no cell is in both {_files(old)} ({_some(had)}) and {_files(new)} ({_some(has)}): "
            "measure the same workloads, baselines and profile"
        )
    check_same_work(old, new, common)
    added = tuple(cell for cell in has if cell not in had)
    missing = {}
    for cell in had:
        runs = sum(cell in result.cells for result in new)
        if runs == 0:
            missing[cell] = _absent(had[cell], [has[other] for other in added])
        elif runs < len(new):
            missing[cell] = (
                f"measured in {runs} of {len(new)} new runs: it failed or was skipped in the others"
            )
        elif lost := [case for case in had[cell].cases if case not in has[cell].cases]:
            missing[cell] = f"without {len(lost)} of its cases: {_some(lost)}"
    return Matched(tuple(cell for cell in common if cell not in missing), missing, added)


def check_same_work(old: Sequence[Result], new: Sequence[Result], cells: Sequence[str]) -> None:
    """Every run of every cell against the first of the old side; raises with all differences at once."""
    found: dict[str, list[str]] = {}
    for cell in cells:
        runs = [result.cells[cell] for result in (*old, *new) if cell in result.cells]
        for other in runs[1:]:
            for difference in cell_differences(runs[0], other):
                names = found.setdefault(difference, [])
                if cell not in names:
                    names.append(cell)
    if found:
        told = "; ".join(f"{difference} ({_some(names)})" for difference, names in found.items())
        raise CannotCompareError(
            f"the two sides are not of the same machine or not of the same work: {told}: measure both with "
            "the same options on the same machine, or store a new baseline"
        )


def first_cells(results: Sequence[Result]) -> dict[str, CellResult]:
    """Each cell's first run."""
    cells: dict[str, CellResult] = {}
    for result in results:
        for cell in result.cells.values():
            cells.setdefault(cell.id, cell)
    return cells


def _absent(cell: CellResult, added: Sequence[CellResult]) -> str:
    same = [other.id for other in added if _row(other) == _row(cell)]
    if same:
        return f"not measured any more; renamed to {same[0]}? Rename it in the baseline's results too"
    return "not measured any more: it was removed or renamed, is skipped, or failed"


def _row(cell: CellResult) -> tuple[str, str, Any]:
    return cell.workload, cell.label, cell.info.get("params")


def _some(names: Sequence[str] | Mapping[str, object]) -> str:
    names = list(names)
    more = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {more} more" if more > 0 else "")


def _files(results: Sequence[Result]) -> str:
    return _some(list(dict.fromkeys(str(result.path) for result in results)))
