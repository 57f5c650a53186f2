"""What a gate run found, cell by cell, and the exit status that follows from it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from statistics import median
from typing import Any

from genie.bench.gate.counters import Change, Shown, gated_changes, shown_counters
from genie.bench.gate.decision import Judgement, Settings
from genie.bench.gate.exit_codes import WORST_FIRST, ExitCode
from genie.bench.gate.matching import Matched, first_cells
from genie.bench.results import CellResult, Result

SCHEMA_VERSION = 1
#: a cell in which only slow-downs beyond this ratio would have been flagged is named: it passes unseen
BLIND_RATIO = 1.25


class Verdict(StrEnum):
    """What is said of a cell's time (and whether it is there)."""

    SAME = "same"
    FASTER = "faster"
    NOT_CONFIRMED = "not confirmed"
    SLOWER = "slower"
    MISSING = "missing"
    NEW = "new"
    TOO_FEW = "too few runs"
    REFERENCE = "reference"


@dataclass(frozen=True)
class CellOutcome:
    """One cell. Times are medians over processes in seconds; None where a side does not have the cell.

    ``first`` and ``again`` are the two stages' judgements; ``changes`` the gated counters that changed.
    """

    id: str
    group: str
    label: str
    verdict: Verdict
    detail: str = ""
    old_s: float | None = None
    new_s: float | None = None
    first: Judgement | None = None
    again: Judgement | None = None
    changes: tuple[Change, ...] = ()
    shown: tuple[Shown, ...] = ()

    @property
    def decided_by(self) -> Judgement | None:
        """The stage that the verdict rests on."""
        return self.again or self.first


@dataclass(frozen=True)
class Side:
    """Where one side's figures come from: a revision, or result files."""

    name: str
    commit: str = ""
    dirty: bool = False
    runs: int = 0

    def __str__(self) -> str:
        commit = self.commit[:12] + ("+dirty" if self.dirty else "")
        return f"{self.name} ({commit})" if commit and commit not in self.name else self.name


@dataclass(frozen=True)
class Outcome:
    """A whole gate run. ``error`` is why nothing could be compared; then there are no cells.

    ``note`` says what the mode cannot do; ``options`` are the command line's, for the record.
    """

    mode: str
    settings: Settings
    cells: tuple[CellOutcome, ...] = ()
    old: Side | None = None
    new: Side | None = None
    fingerprint: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    wall_s: float = 0.0
    note: str = ""
    error: str = ""

    def with_verdict(self, *verdicts: Verdict) -> list[CellOutcome]:
        return [cell for cell in self.cells if cell.verdict in verdicts]

    @property
    def changed(self) -> list[CellOutcome]:
        """Cells whose gated counters changed, accepted or not."""
        return [cell for cell in self.cells if cell.changes]

    @property
    def blind(self) -> list[CellOutcome]:
        """Cells that pass because of their noise: a slow-down of 25 % might not have been flagged."""
        return [
            cell
            for cell in self.with_verdict(Verdict.SAME)
            if cell.first is not None and (cell.first.detectable or 0) > BLIND_RATIO
        ]

    @property
    def findings(self) -> frozenset[ExitCode]:
        """Everything that fails this run."""
        found = {
            ExitCode.CANNOT_COMPARE: bool(self.error),
            ExitCode.MISSING_CELLS: bool(self.with_verdict(Verdict.MISSING)),
            ExitCode.REGRESSION: bool(self.with_verdict(Verdict.SLOWER)),
            ExitCode.COUNTERS_CHANGED: bool(self.changed) and not self.settings.accept_counters,
        }
        return frozenset(code for code, is_so in found.items() if is_so)

    @property
    def exit_code(self) -> ExitCode:
        return next((code for code in WORST_FIRST if code in self.findings), ExitCode.PASSED)

    def summary(self) -> str:
        """One line: what was found, worst first."""
        if self.error:
            return f"cannot compare: {self.error}"
        parts = [
            f"{len(cells)} {what}"
            for cells, what in (
                (self.with_verdict(Verdict.MISSING), "missing"),
                (self.with_verdict(Verdict.SLOWER), "slower"),
                (self.changed, "with changed counters" + self._accepted()),
                (self.with_verdict(Verdict.FASTER), "faster"),
                (self.with_verdict(Verdict.NEW), "new"),
                (self.with_verdict(Verdict.TOO_FEW), "with too few runs"),
                (self.with_verdict(Verdict.NOT_CONFIRMED), "flagged and not confirmed"),
                (self.with_verdict(Verdict.SAME), "not slower"),
                (self.with_verdict(Verdict.REFERENCE), f"as {Verdict.REFERENCE}"),
            )
            if cells
        ]
        return f"{len(self.cells)} cells: {', '.join(parts)}"

    def _accepted(self) -> str:
        return " (accepted)" if self.settings.accept_counters else ""

    def as_dict(self) -> dict[str, Any]:
        """The complete record, plain JSON values."""
        return {
            "schema_version": SCHEMA_VERSION,
            "kind": "genie gate",
            "mode": self.mode,
            "exit_code": int(self.exit_code),
            "outcome": self.exit_code.name.lower(),
            "findings": sorted(code.name.lower() for code in self.findings),
            "summary": self.summary(),
            "error": self.error or None,
            "note": self.note,
            "blind": [cell.id for cell in self.blind],
            "settings": asdict(self.settings),
            "options": dict(self.options),
            "old": asdict(self.old) if self.old else None,
            "new": asdict(self.new) if self.new else None,
            "fingerprint": dict(self.fingerprint),
            "wall_s": round(self.wall_s, 3),
            "cells": [asdict(cell) for cell in self.cells],
        }


def conclude(
    matched: Matched,
    old: Sequence[Result],
    new: Sequence[Result],
    first: Mapping[str, Judgement],
    again: Mapping[str, Judgement] | None,
    references: Collection[str] = (),
) -> tuple[CellOutcome, ...]:
    """Every cell's outcome, in the files' order, new cells last.

    ``first`` judges what could be judged; ``again`` are the fresh runs of the flagged cells alone, None
    where nothing can be run again: then a flagged cell fails at once. ``references`` are the cells that
    the others are ratios of.
    """
    had, has = first_cells(old), first_cells(new)
    outcomes = []
    for cell_id, cell in had.items():
        olds, news = _runs(old, cell_id), _runs(new, cell_id)
        verdict, detail = _verdict(cell_id, matched, first, again)
        if cell_id in references and verdict is Verdict.TOO_FEW:
            verdict, detail = Verdict.REFERENCE, ""
        outcomes.append(
            CellOutcome(
                id=cell_id,
                group=cell.group,
                label=cell.label,
                verdict=verdict,
                detail=detail,
                old_s=_median_s(olds),
                new_s=_median_s(news),
                first=first.get(cell_id),
                again=(again or {}).get(cell_id),
                changes=gated_changes(olds, news) if news else (),
                shown=shown_counters(olds, news) if news else (),
            )
        )
    for cell_id in matched.added:
        cell, news = has[cell_id], _runs(new, cell_id)
        outcomes.append(CellOutcome(cell_id, cell.group, cell.label, Verdict.NEW, new_s=_median_s(news)))
    return tuple(outcomes)


def fingerprint_of(results: Sequence[Result]) -> Mapping[str, Any]:
    """Client of the first run, and the devices of its cell that may use the most."""
    stored = [cell.info["fingerprint"] for cell in results[0].cells.values()]
    found: Mapping[str, Any] = max(stored, key=lambda one: len(one.get("devices") or ()))
    return found


def flagged(judgements: Mapping[str, Judgement]) -> list[str]:
    """Ids of the cells to run again."""
    return [cell for cell, judgement in judgements.items() if judgement.slower]


def _verdict(
    cell: str, matched: Matched, first: Mapping[str, Judgement], again: Mapping[str, Judgement] | None
) -> tuple[Verdict, str]:
    if cell in matched.missing:
        return Verdict.MISSING, matched.missing[cell]
    if cell not in first:
        return Verdict.TOO_FEW, "the old side has too few runs of it to judge"
    if first[cell].faster:
        return Verdict.FASTER, ""
    if not first[cell].slower:
        return Verdict.SAME, ""
    if again is None:
        return Verdict.SLOWER, "not run again, because the results were given"
    if cell not in again:
        return Verdict.MISSING, "flagged, and it failed or was skipped when it was run again"
    if again[cell].slower:
        return Verdict.SLOWER, "confirmed by fresh runs"
    return Verdict.NOT_CONFIRMED, "flagged at first, and fresh runs alone did not confirm it"


def _runs(results: Sequence[Result], cell: str) -> list[CellResult]:
    return [result.cells[cell] for result in results if cell in result.cells]


def _median_s(cells: Sequence[CellResult]) -> float | None:
    return median(cell.median_s for cell in cells) if cells else None
