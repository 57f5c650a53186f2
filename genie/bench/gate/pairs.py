"""Old and new measured in alternating order, each in a fresh process with fresh servers.

Pairs run in the order ABBA BAAB ..., so that neither side is first more often and a steady drift of
the machine cancels. Each finished process is kept in the state folder at once: after an interruption
only what is missing runs.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from genie.bench.fingerprint import differences
from genie.bench.gate import revisions
from genie.bench.gate.decision import Pair
from genie.bench.gate.environment import python_for
from genie.bench.gate.process import Side, ended_by_sigterm, measure
from genie.bench.results import Result, load_result
from genie.errors import CannotCompareError, ResultError

#: where trees, environments and unfinished runs lie in a repository
CACHE = Path(".genie") / "gate"
_SETTINGS = "settings.json"
#: of every four pairs, in which the new side is first
_NEW_FIRST = (False, True, True, False)
#: the marker of cells: the benchmarks of the link are none
_CELLS = "genie_workload"


@dataclass(frozen=True)
class Suite:
    """What one process measures. ``select`` is a -k expression, "" for all cells."""

    profile: str = "smoke"
    baselines: tuple[str, ...] = (
        "local_pytorch",
        "genie_capture_only",
        "genie_local_remote",
        "genie_no_semantics",
        "genie_full",
    )
    rounds: int = 5
    select: str = ""

    def arguments(self, cells: Collection[str] | None = None) -> list[str]:
        """pytest's; ``cells`` are ids of the cells to measure instead of all."""
        selection = ["-k", self.select] if self.select and cells is None else []
        return [
            *(cells if cells is not None else ["bench_tests"]), "-m", _CELLS, *selection,
            "--genie-profile", self.profile, "--genie-baselines", ",".join(self.baselines),
            "--genie-rounds", str(self.rounds), "--genie-no-ceiling",
        ]  # fmt: skip


class PairRunner:
    """Measures pairs in ``state``, where finished processes of the same comparison may lie already."""

    def __init__(self, old: Side, new: Side, suite: Suite, state: Path, tell: Callable[[str], None]) -> None:
        self._sides = {"old": old, "new": new}
        self._suite = suite
        self._state = state
        self._tell = tell
        self._seconds: list[float] = []

    def run(self, count: int, stage: str, cells: Collection[str] | None = None) -> list[Pair]:
        """``count`` pairs of stage "first" or "again"; only ``cells`` (ids) where given.

        A cell that failed is absent from its result. Pairs of a stage that were measured for other cells
        are measured anew. Raises CannotCompareError; a KeyboardInterrupt passes, after a line on how to
        go on.
        """
        self._forget_others(stage, cells)
        planned = list(order(count))
        missing = [one for one in planned if not self._file(stage, *one).exists()]
        if len(missing) < len(planned):
            self._tell(f"{len(planned) - len(missing)} of {len(planned)} processes were measured before")
        results: dict[tuple[int, str], Result] = {}
        try:
            for number, (pair, label) in enumerate(planned, 1):
                if (pair, label) not in missing:
                    results[pair, label] = self._load(self._file(stage, pair, label))
                    continue
                left = len(missing) - missing.index((pair, label))
                results[pair, label] = self._measure(
                    stage, pair, label, cells, f"{number} of {len(planned)}", left
                )
        except KeyboardInterrupt:
            kept = len(list(self._state.glob("*-*-*.json")))
            self._tell(f"stopped: {kept} finished processes are kept in {self._state}; go on with --resume")
            raise
        return [Pair(results[pair, "old"], results[pair, "new"]) for pair in range(count)]

    def _measure(
        self, stage: str, pair: int, label: str, cells: Collection[str] | None, place: str, left: int
    ) -> Result:
        side = self._sides[label]
        rest = f", about {_told(median(self._seconds) * left)} left" if self._seconds else ""
        self._tell(f"process {place} ({stage}): {label} side, {side.name}{rest}")
        start = time.monotonic()
        result = measure(side, self._suite.arguments(cells), self._file(stage, pair, label))
        self._seconds.append(time.monotonic() - start)
        return result

    def _file(self, stage: str, pair: int, label: str) -> Path:
        return self._state / f"{stage}-{pair:03}-{label}.json"

    def _load(self, file: Path) -> Result:
        try:
            return load_result(file)
        except ResultError as error:
            raise CannotCompareError(f"{error}; or delete it, and --resume measures it again") from None

    def _forget_others(self, stage: str, cells: Collection[str] | None) -> None:
        record = self._state / f"{stage}.cells.json"
        wanted = None if cells is None else sorted(cells)
        if record.exists() and json.loads(record.read_text(encoding="utf-8")) == wanted:
            return
        for file in self._state.glob(f"{stage}-*.json"):
            file.unlink()
        write_json(record, wanted)
        self._seconds.clear()


def order(count: int) -> Iterator[tuple[int, str]]:
    """(pair, "old" or "new") of each process, in the order ABBA BAAB ..."""
    for pair in range(count):
        labels = ("new", "old") if _NEW_FIRST[pair % len(_NEW_FIRST)] else ("old", "new")
        for label in labels:
            yield pair, label


@contextmanager
def against(
    rev: str,
    suite: Suite,
    *,
    tell: Callable[[str], None],
    folder: Path = Path(),
    allow_dirty: bool = False,
    keep: bool = False,
    resume: bool = False,
) -> Iterator[tuple[PairRunner, revisions.Revision, revisions.Revision]]:
    """A runner for ``rev`` against what is checked out in ``folder``, and the two revisions.

    Results and logs of all processes lie in the cache until the next run; with ``keep`` the trees do, too.
    With ``resume`` finished processes of the same comparison are kept, and CannotCompareError is raised
    where there are none, or those there are of another comparison. Without it they are deleted.
    """
    repository = revisions.repository_of(folder)
    cache = repository / CACHE
    made = revisions.prepare(rev, repository=repository, cache=cache, allow_dirty=allow_dirty, keep=keep)
    with ended_by_sigterm(), made as (old, new):
        python = python_for(old.tree, new.tree, cache, tell)
        state = cache / "state"
        facts = {
            "old": old.identity,
            "new": new.identity,
            **asdict(suite),
            "baselines": list(suite.baselines),
        }
        open_state(state, facts, resume=resume)
        runner = PairRunner(
            Side("old", str(old), old.tree, python), Side("new", str(new), new.tree), suite, state, tell
        )
        yield runner, old, new


def open_state(state: Path, facts: Mapping[str, Any], *, resume: bool) -> None:
    """Makes ``state`` ready for a comparison that ``facts`` (plain JSON) identify.

    Raises CannotCompareError where it cannot be written, or ``resume`` finds another comparison.
    """
    record = state / _SETTINGS
    if resume:
        try:
            before = json.loads(record.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            raise CannotCompareError(f"nothing to resume in {state}: run again without --resume") from None
        changed = differences(facts, before)
        if changed:
            raise CannotCompareError(
                f"the run in {state} is another comparison ({'; '.join(changed)}): resume it with the same "
                "revisions and options, or start anew without --resume"
            )
        return
    try:
        state.mkdir(parents=True, exist_ok=True)
        if any(state.iterdir()) and not record.exists():
            raise CannotCompareError(
                f"{state} holds something else than a gate's results: give an empty folder"
            )
        for file in state.iterdir():
            if file.is_file():
                file.unlink()
    except OSError as error:
        raise CannotCompareError(
            f"cannot write {state}: {error.strerror}: free the disk or mend it"
        ) from None
    write_json(record, facts)


def write_json(file: Path, value: Any) -> None:
    """Whole or not at all."""
    scratch = file.with_suffix(".part")
    try:
        scratch.write_text(json.dumps(value, indent=1), encoding="utf-8")
        os.replace(scratch, file)
    except OSError as error:
        raise CannotCompareError(
            f"cannot write {file}: {error.strerror}: free the disk and try again; finished processes are kept"
        ) from None


def _told(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"
