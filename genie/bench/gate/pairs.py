"""Old and new measured side by side, in turns, each pair in fresh processes with fresh servers.

Within a pair the rounds run in the order ABBA ABBA ..., every second pair is mirrored, so neither side is
first more often and a drift of the machine cancels. Each finished pair is kept in the state folder at
once: after an interruption only what is missing runs.
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
#: timed rounds of a process: more where a round is short, so that all cells have about the same spread
ROUNDS = "11,vision_cnn=5,microbenchmark=3"
#: the markers of cells, and of what is measured beside them (the benchmarks of the link are not)
_CELLS = "genie_workload or genie_gated"


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
    rounds: str = ROUNDS
    select: str = ""

    def arguments(self, cells: Collection[str] | None = None) -> list[str]:
        """pytest's; ``cells`` are ids of the cells to measure instead of all."""
        selection = ["-k", self.select] if self.select and cells is None else []
        return [
            *(cells if cells is not None else ["bench_tests"]), "-m", _CELLS, *selection,
            "--genie-profile", self.profile, "--genie-baselines", ",".join(self.baselines),
            "--genie-rounds", self.rounds, "--genie-no-ceiling",
        ]  # fmt: skip


class PairRunner:
    """Measures pairs in ``state``, where finished processes of the same comparison may lie already."""

    def __init__(self, old: Side, new: Side, suite: Suite, state: Path, tell: Callable[[str], None]) -> None:
        self._sides = (old, new)
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
        missing = [pair for pair in range(count) if not all(map(Path.exists, self._files(stage, pair)))]
        if len(missing) < count:
            self._tell(f"{count - len(missing)} of {count} pairs were measured before")
        found = []
        try:
            for pair in range(count):
                if pair not in missing:
                    found.append(Pair(*map(self._load, self._files(stage, pair))))
                    continue
                left = len(missing) - missing.index(pair)
                rest = f", about {_told(median(self._seconds) * left)} left" if self._seconds else ""
                self._tell(f"pair {pair + 1} of {count} ({stage}){rest}")
                start = time.monotonic()
                found.append(self._measure(stage, pair, cells))
                self._seconds.append(time.monotonic() - start)
        except KeyboardInterrupt:
            kept = len(list(self._state.glob("*-*-new.json")))
            self._tell(f"stopped: {kept} finished pairs are kept in {self._state}; go on with --resume")
            raise
        return found

    def _measure(self, stage: str, pair: int, cells: Collection[str] | None) -> Pair:
        runs = list(zip(self._sides, self._files(stage, pair), strict=True))
        return Pair(*measure(runs, self._suite.arguments(cells), mirrored=bool(pair % 2)))

    def _files(self, stage: str, pair: int) -> list[Path]:
        return [self._state / f"{stage}-{pair:03}-{side.label}.json" for side in self._sides]

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
