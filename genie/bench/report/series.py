"""Runs that may share a trend line: those whose cells agree in fingerprint, profile, sizes and weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from genie.bench.fingerprint import cell_differences, differences
from genie.bench.report.facts import Facts, read_facts
from genie.bench.results import CellResult, Result


@dataclass(frozen=True)
class Run:
    """One result file with its cells' figures, by cell id."""

    result: Result
    facts: Mapping[str, Facts]

    @property
    def commit(self) -> str:
        """Short, marked ``+`` for uncommitted changes; "no commit" outside a repository."""
        if not self.result.commit:
            return "no commit"
        return self.result.commit[:7] + ("+" if self.result.dirty else "")

    @property
    def cells(self) -> list[Facts]:
        """The matrix, without the link benchmarks."""
        return [facts for facts in self.facts.values() if not facts.is_beside]


@dataclass
class Series:
    """Comparable runs, oldest first. ``differs`` says why they are not in the first series."""

    number: int
    runs: list[Run] = field(default_factory=list)
    differs: list[str] = field(default_factory=list)
    #: the first cell seen of each id; agreement with these is agreement with every run
    _seen: dict[str, CellResult] = field(default_factory=dict)

    @property
    def newest(self) -> Run:
        return self.runs[-1]

    @property
    def gone(self) -> list[Facts]:
        """Cells of earlier runs that the newest run lacks, as last seen."""
        last = {id_: facts for run in self.runs for id_, facts in run.facts.items()}
        return [facts for id_, facts in last.items() if id_ not in self.newest.facts]

    def history(self, id_: str) -> list[tuple[Run, Facts]]:
        """The runs that have this cell."""
        return [(run, run.facts[id_]) for run in self.runs if id_ in run.facts]

    def differences(self, result: Result) -> list[str]:
        """Why ``result`` may not join, without repetition; empty when it may."""
        common = [id_ for id_ in result.cells if id_ in self._seen]
        if common:
            found = [line for id_ in common for line in cell_differences(result.cells[id_], self._seen[id_])]
        else:
            # No cell in common: host and profile are what is left to compare.
            found = differences(_setting(result), _setting(self.runs[0].result))
        return list(dict.fromkeys(found))

    def add(self, run: Run) -> None:
        self.runs.append(run)
        self._seen = {**run.result.cells, **self._seen}


def group_runs(results: Sequence[Result]) -> list[Series]:
    """Each run in the first series that it agrees with. ``results`` oldest first and not empty."""
    series: list[Series] = []
    for result in results:
        run = Run(result, {id_: read_facts(cell, result.path) for id_, cell in result.cells.items()})
        home = next((one for one in series if not one.differences(result)), None)
        if home is None:
            home = Series(number=len(series) + 1)
            if series:
                home.differs = series[0].differences(result)
            series.append(home)
        home.add(run)
    return series


def _setting(result: Result) -> dict[str, object]:
    cell = next(iter(result.cells.values()))
    return {"profile": cell.profile, "client": (cell.info.get("fingerprint") or {}).get("client")}
