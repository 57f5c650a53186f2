"""Results are compared only where they are of the same work on the same devices; all else is an error.

``pytest-benchmark compare`` is refused in genie.bench.grouping. A run with ``--benchmark-compare`` is
refused before its first cell as far as its outcome is known then, and at its end for the rest; what
it measured is saved and shown all the same, without the comparison.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from genie.bench.cells import cell_of
from genie.bench.options import BASELINES
from genie.bench.session import SESSION, BenchSession
from genie.errors import ResultError

if TYPE_CHECKING:
    from genie.bench.results import CellResult

REMEDY = (
    "Compare results of one machine, profile, set of weights and set of libraries: measure the other "
    "revision again where they differ, or name only files that agree."
)
THIS_RUN = "this run"
#: what runs in the client's process on its one local device
LOCAL_BASELINES = ("local_pytorch", "local_compiled", "genie_capture_only")


def refusal(results: Iterable[tuple[str, Iterable[CellResult]]]) -> str:
    """Why these results, each with its name, may not stand in one table; "" when they may.

    A cell is judged against the same cell in the first result that has it, or, where none has, against
    any cell of its table.
    """
    from genie.bench.fingerprint import cell_differences, neighbour_differences

    same: dict[str, tuple[str, CellResult]] = {}
    beside: dict[str, tuple[str, CellResult]] = {}
    found: dict[tuple[str, str], dict[str, list[str]]] = {}
    for name, cells in results:
        for cell in cells:
            known = same.setdefault(cell.id, (name, cell))
            neighbour = beside.setdefault(cell.group, (name, cell))
            if known[0] != name:
                other, reasons = known[0], cell_differences(known[1], cell)
            elif neighbour[0] != name:
                other, reasons = neighbour[0], neighbour_differences(neighbour[1], cell)
            else:
                continue
            for reason in reasons:
                found.setdefault((other, name), {}).setdefault(reason, []).append(cell.name)
    return told(found)


def told(found: Mapping[tuple[str, str], Mapping[str, Sequence[str]]]) -> str:
    """The message: for each pair of results a line per difference, with the cells that have it."""
    if not found:
        return ""
    lines = ["these results may not be compared:"]
    for (one, other), reasons in found.items():
        lines.append(f"  {one} against {other}:")
        for reason, cells in reasons.items():
            more = f" and {len(cells) - 1} more" if len(cells) > 1 else ""
            lines.append(f"    {reason} ({cells[0]}{more})")
    return "\n".join([*lines, REMEDY])


def is_ours(bench: Mapping[str, Any]) -> bool:
    """Whether a stored benchmark is a cell, or a benchmark of the link."""
    info = bench.get("extra_info") or {}
    return "baseline" in info and "workload" in info


def cells_of(benchmarks: Iterable[Mapping[str, Any]], path: Path) -> list[CellResult]:
    """This suite's cells among stored benchmarks. Raises ResultError for one that is not readable."""
    from genie.bench.results import parse_result

    ours = [bench for bench in benchmarks if is_ours(bench)]
    return list(parse_result({"benchmarks": ours}, path).cells.values()) if ours else []


@pytest.hookimpl(wrapper=True, optionalhook=True)
def pytest_benchmark_compare_machine_info(
    machine_info: dict[str, Any], compared_benchmark: dict[str, Any]
) -> Generator[None, object, object]:
    """Keeps pytest-benchmark from warning of every difference: cells bring what is to be compared."""
    stored = compared_benchmark["machine_info"]
    if any(map(is_ours, compared_benchmark["benchmarks"])):
        compared_benchmark["machine_info"] = machine_info
    try:
        return (yield)
    finally:
        compared_benchmark["machine_info"] = stored


class Comparison:
    """Plugin of a run: how pytest-benchmark shows its cells, saves them, and compares them."""

    def __init__(self) -> None:
        self._refusal = ""

    @pytest.hookimpl(tryfirst=True, optionalhook=True)
    def pytest_benchmark_group_stats(
        self, config: pytest.Config, benchmarks: list[dict[str, Any]], group_by: str
    ) -> list[Any] | None:
        """For cells in any folder; a conftest.py with these hooks is for ``pytest-benchmark compare``."""
        from genie.bench.grouping import pytest_benchmark_group_stats

        ours = any(map(is_ours, benchmarks))
        return pytest_benchmark_group_stats(config, benchmarks, group_by) if ours else None

    @pytest.hookimpl(tryfirst=True, optionalhook=True)
    def pytest_benchmark_scale_unit(
        self,
        config: pytest.Config,
        unit: str,
        benchmarks: list[dict[str, Any]],
        best: Any,
        worst: Any,
        sort: str,
    ) -> tuple[str, float] | None:
        from genie.bench.grouping import pytest_benchmark_scale_unit

        ours = any(map(is_ours, benchmarks))
        return pytest_benchmark_scale_unit(config, unit, benchmarks, best, worst, sort) if ours else None

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """Raises UsageError when cells that are about to run may not be compared with the stored ones."""
        benchmarks = session.config.pluginmanager.get_plugin("pytest-benchmark")
        ours = session.config.stash.get(SESSION, None)
        if ours is None or ours.parallel or benchmarks is None:
            return
        benchmarks.save_data = True
        planned = {item.nodeid: item for item in session.items if cell_of(item) is not None}
        found: dict[tuple[str, str], dict[str, list[str]]] = {}
        try:
            for path, stored in benchmarks.compared_mapping.items():
                for cell in cells_of(stored.values(), Path(path)):
                    for reason in _planned_differences(cell, planned.get(cell.id), ours):
                        reasons = found.setdefault((Path(path).name, THIS_RUN), {})
                        reasons.setdefault(reason, []).append(cell.name)
        except ResultError as error:
            raise pytest.UsageError(f"--benchmark-compare: {error}") from None
        if found:
            raise pytest.UsageError(f"--benchmark-compare: {told(found)}")

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> Generator[None, object, object]:
        """Before pytest-benchmark compares: what only the run could show (servers elsewhere, weights)."""
        benchmarks = session.config.pluginmanager.get_plugin("pytest-benchmark")
        if benchmarks is not None and benchmarks.compared_mapping and SESSION in session.config.stash:
            timed = [bench for bench in benchmarks.benchmarks if bench and not bench.has_error]
            now = cells_of([bench.as_dict(include_data=False) for bench in timed], Path(THIS_RUN))
            stored = [
                (Path(path).name, cells_of([kept[cell.id] for cell in now if cell.id in kept], Path(path)))
                for path, kept in benchmarks.compared_mapping.items()
            ]
            self._refusal = refusal([*stored, (THIS_RUN, now)])
            if self._refusal:
                benchmarks.compared_mapping, benchmarks.compare_fail = {}, []
                if session.exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
                    session.exitstatus = pytest.ExitCode.USAGE_ERROR
        return (yield)

    @pytest.hookimpl(trylast=True)
    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if self._refusal:
            terminalreporter.write_line(f"ERROR: --benchmark-compare: {self._refusal}", red=True)


def _planned_differences(stored: CellResult, item: pytest.Item | None, session: BenchSession) -> list[str]:
    """What is known of a cell before it runs, against its stored result."""
    from genie.bench.fingerprint import differences

    cell = cell_of(item) if item is not None else None
    if item is None or cell is None:
        return []
    then: dict[str, Any] = {"profile": stored.profile}
    now: dict[str, Any] = {"profile": session.profile}
    marker = item.get_closest_marker("genie_workload")
    if marker is not None and isinstance(marker.args[0], str):  # others may bring weights of their own
        then["weights"] = {"source": stored.info["weights"].get("source")}
        now["weights"] = {"source": "seeded" if session.options.weights == "seeded" else "pretrained"}
    local = cell["baseline"] in LOCAL_BASELINES
    fingerprint = session.fingerprint(cell["baseline"], remote=not local)
    known = ["client"]
    # Servers elsewhere are asked when they are needed, and only a user's baseline knows where it runs.
    elsewhere = session.options.addresses or session.options.launch.launcher == "ray"
    if local or (cell["baseline"] in BASELINES and not elsewhere):
        known.append("devices")
    then |= {key: stored.info["fingerprint"].get(key) for key in known}
    now |= {key: fingerprint[key] for key in known}
    return differences(then, now)
