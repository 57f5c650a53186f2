"""Result files read back: pytest-benchmark's JSON with this suite's ``extra_info``, checked.

What the gate, the report and ``pytest-benchmark compare`` read goes through here, so that a damaged
file or one of another schema version is an error with a remedy and never a wrong figure.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from genie.bench.schema import OLDEST_READABLE, SCHEMA_VERSION
from genie.errors import ResultError

#: pytest-benchmark's word for a run outside a repository
UNVERSIONED = "unversioned"
#: what a cell must have to be one of ours and readable
MAPPINGS = ("verified", "wire", "weights", "fingerprint")
NEEDED = ("baseline", "workload", "profile", "verified", "wire", "weights", "fingerprint")


@dataclass(frozen=True)
class CellResult:
    """One verified cell (or link benchmark) of one run.

    ``id`` is pytest-benchmark's ``fullname``: the same cell has the same id in every run.
    ``label`` names its row: the baseline, with `` -feature`` for each feature switched off.
    ``samples_s`` are the raw rounds in seconds, empty where the file was saved without them.
    ``cases`` are medians in seconds by case; one case ``""`` for all but the microbenchmark.
    ``info`` is the stored ``extra_info`` (schema: genie.bench.record).
    """

    id: str
    name: str
    group: str
    baseline: str
    label: str
    workload: str
    profile: str
    info: Mapping[str, Any]
    stats: Mapping[str, Any]
    median_s: float
    samples_s: tuple[float, ...]
    cases: Mapping[str, float]


@dataclass(frozen=True)
class Result:
    """One run of the suite, as stored. ``commit`` is "" where the run was outside a repository."""

    path: Path
    commit: str
    dirty: bool
    branch: str
    when: str
    machine: Mapping[str, Any]
    ceiling: Mapping[str, Any] | None
    #: what one device reaches at most, by dtype (genie.bench.limits)
    limits: tuple[Mapping[str, Any], ...]
    cells: Mapping[str, CellResult]


def cell_label(info: Mapping[str, Any]) -> str:
    """Name of a row: the baseline, and what was switched off in it."""
    return info["baseline"] + "".join(f" -{feature}" for feature in info.get("ablated", ()))


def load_result(path: Path | str) -> Result:
    """The run stored at ``path``. Raises ResultError that names the remedy."""
    path = Path(path)
    try:
        raw = json.loads(path.read_bytes())
    except OSError as error:
        raise ResultError(f"cannot read {path}: {error.strerror}: give the path of a result file") from None
    except ValueError as error:
        raise ResultError(
            f"{path} is not JSON ({error}): it is damaged, perhaps cut off while it was written; "
            "run the suite again with --benchmark-json"
        ) from None
    return parse_result(raw, path)


def parse_result(raw: Any, path: Path) -> Result:
    """A file's content, checked. Benchmarks that are not of this suite are left out."""
    if not isinstance(raw, dict) or not isinstance(raw.get("benchmarks"), list):
        raise ResultError(f"{path} is no result of pytest-benchmark: it has no list of benchmarks")
    cells = {}
    for bench in raw["benchmarks"]:
        cell = _cell(bench, path)
        if cell is not None:
            cells[cell.id] = cell
    if not cells:
        raise ResultError(
            f"{path} has no cell of this suite: store one with "
            "`pytest bench_tests --benchmark-only --benchmark-json FILE`"
        )
    commit = raw.get("commit_info") or {}
    genie = raw.get("genie") or {}
    return Result(
        path=path,
        commit="" if commit.get("id") in (None, UNVERSIONED) else commit["id"],
        dirty=bool(commit.get("dirty")),
        branch=commit.get("branch") or "",
        when=raw.get("datetime") or "",
        machine=raw.get("machine_info") or {},
        ceiling=genie.get("ceiling"),
        limits=tuple(genie.get("limits") or ()),
        cells=cells,
    )


def load_results(paths: Iterable[Path | str]) -> list[Result]:
    """All of them, oldest first (by the time of the run)."""
    return sorted((load_result(path) for path in paths), key=lambda result: result.when)


def _cell(bench: Any, path: Path) -> CellResult | None:
    if not isinstance(bench, dict):
        raise ResultError(f"{path}: a benchmark is not an object: the file is damaged; run the suite again")
    info = bench.get("extra_info") or {}
    if "baseline" not in info or "workload" not in info:
        return None
    name = bench.get("fullname") or bench.get("name")
    version = info.get("schema_version")
    if version not in range(OLDEST_READABLE, SCHEMA_VERSION + 1):
        raise ResultError(
            f"{path}: {name} has schema version {version}, this suite reads {OLDEST_READABLE} to "
            f"{SCHEMA_VERSION}: "
            "run the suite again, or read the file with the version that wrote it"
        )
    try:
        missing = [key for key in NEEDED if key not in info]
        if missing:
            raise KeyError(missing[0])
        for key in MAPPINGS:
            if not isinstance(info[key], Mapping):
                raise TypeError(f"{key} is no object")
        stats = bench["stats"]
        cases = info.get("cases")
        return CellResult(
            id=bench["fullname"],
            name=bench["name"],
            group=bench["group"] or info["workload"],
            baseline=info["baseline"],
            label=cell_label(info),
            workload=info["workload"],
            profile=info["profile"],
            info=info,
            stats=stats,
            median_s=float(stats["median"]),
            samples_s=tuple(float(value) for value in stats.get("data") or ()),
            cases={case: float(row["median_s"]) for case, row in cases.items()}
            if cases
            else {"": float(stats["median"])},
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ResultError(
            f"{path}: {name} is incomplete ({type(error).__name__}: {error}): the file is damaged; "
            "run the suite again"
        ) from None
