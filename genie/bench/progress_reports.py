"""The plugin object behind live progress: which cells there are, when each begins, what each took."""

from __future__ import annotations

import time
from collections.abc import Generator, Sequence

import pytest

from genie.bench import cells, progress
from genie.bench.session import SESSION
from genie.runtime import progress as uploads

#: pytest's cache: {profile: {node id: seconds}} of the last run
CACHE_KEY = "genie/cell_seconds"


class ProgressReports:
    """Plugin object: begins and ends cells by pytest's own hooks; keeps their durations for the next run."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        self._labels: dict[str, str] = {}
        self._failed: set[str] = set()
        self._estimate = progress.Estimate({})

    @pytest.hookimpl(wrapper=True)
    def pytest_runtestloop(self, session: pytest.Session) -> Generator[None, object, object]:
        config = self._config
        self._labels = _labels(session.items)
        bench = config.stash.get(SESSION, None)
        if not self._labels or bench is None or bench.parallel or config.option.collectonly:
            self._labels = {}
            return (yield)
        self._estimate = progress.Estimate(self._cached().get(bench.profile, {}), list(self._labels))
        bench.progress.start(progress.display_for(config), self._estimate)
        try:
            # Also where nothing is shown: a bar refreshes itself from a thread, in timed requests too.
            with uploads.reported_to(bench.progress.uploaded):
                return (yield)
        finally:
            bench.progress.stop()
            self._keep(bench.profile)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_logstart(self, nodeid: str) -> None:
        if nodeid in self._labels:
            self._estimate.begin(nodeid, time.monotonic())
            self._config.stash[SESSION].progress.begin(self._labels[nodeid])

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        self._phase(item, progress.SET_UP)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_call(self, item: pytest.Item) -> None:
        if cells.is_link(item):  # a cell tells its own phases
            self._phase(item, "measuring")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self._failed.add(report.nodeid)

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        if nodeid in self._labels:
            self._estimate.end(time.monotonic())

    def _phase(self, item: pytest.Item, name: str) -> None:
        if item.nodeid in self._labels:
            self._config.stash[SESSION].progress.phase(name)

    def _cached(self) -> dict[str, dict[str, float]]:
        cache = getattr(self._config, "cache", None)
        found = cache.get(CACHE_KEY, {}) if cache is not None else {}
        return found if isinstance(found, dict) else {}

    def _keep(self, profile: str) -> None:
        """A cell that failed, or was not timed, says nothing about how long it takes."""
        cache = getattr(self._config, "cache", None)
        if cache is None or self._config.getoption("benchmark_disable", False):
            return
        took = {node: s for node, s in self._estimate.finished.items() if node not in self._failed}
        all_profiles = self._cached()
        cache.set(CACHE_KEY, all_profiles | {profile: all_profiles.get(profile, {}) | took})


def _labels(items: Sequence[pytest.Item]) -> dict[str, str]:
    """ "[k/n] workload on baseline" of every cell and link benchmark, by node id, in run order."""
    names: dict[str, str] = {}
    for item in items:
        cell = cells.cell_of(item)
        if cell is not None:
            params = "".join(f" {name}={value}" for name, value in cell["params"].items())
            ablated = f" without {', '.join(cell['ablated'])}" if cell["ablated"] else ""
            names[item.nodeid] = f"{cell['workload']}{params} on {cell['baseline']}{ablated}"
        elif cells.is_beside(item):
            names[item.nodeid] = item.name.removeprefix("test_").replace("_", " ")
    return {node: f"[{k}/{len(names)}] {name}" for k, (node, name) in enumerate(names.items(), start=1)}
