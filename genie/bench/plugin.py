"""The pytest plugin (entry point ``genie``): options, cells, fixtures, results, summary.

Loaded by every pytest run of the environment, so it imports nothing heavy and does nothing until a
test marked ``genie_workload`` is collected.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import pytest

from genie.bench import cells, fixtures, newhooks
from genie.bench.comparing import Comparison, pytest_benchmark_compare_machine_info  # noqa: F401  (a hook)
from genie.bench.fixtures import (  # noqa: F401  (pytest finds fixtures among a plugin's names)
    baseline,
    client_cost,
    genie_capture_only,
    genie_full,
    genie_link,
    genie_local_remote,
    genie_no_semantics,
    genie_ray_pool,
    genie_rpc_pool,
    genie_servers,
    genie_session,
    local_compiled,
    local_pytorch,
    measure,
    pytorch_rpc,
    ray_actor,
    workload,
)
from genie.bench.options import add_options, read_options
from genie.bench.progress_reports import ProgressReports
from genie.bench.session import OPTIONS, SESSION, is_parallel
from genie.bench.sigterm import EndedBySigterm
from genie.bench.summary import Summary


def pytest_addhooks(pluginmanager: pytest.PytestPluginManager) -> None:
    pluginmanager.add_hookspecs(newhooks)


def pytest_addoption(parser: pytest.Parser) -> None:
    add_options(parser)


def pytest_configure(config: pytest.Config) -> None:
    for text in (cells.MARKER_HELP, cells.GATED_HELP, cells.PROFILES_HELP):
        config.addinivalue_line("markers", text)
    # An xdist controller collects nothing, so it has to judge by the hooks that are known now.
    own = cells.own_baselines(config, config.hook) if is_parallel(config) else None
    config.stash[OPTIONS] = read_options(config, own=own)
    config.pluginmanager.register(CellReports(), "genie-cell-reports")
    config.pluginmanager.register(Comparison(), "genie-comparison")
    config.pluginmanager.register(ProgressReports(config), "genie-progress")
    config.pluginmanager.register(EndedBySigterm(config), "genie-sigterm")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    cells.make_cells(metafunc)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    cells.require_selected(config)
    items[:] = cells.in_run_order(cells.with_selected_beside(config, items))


@pytest.hookimpl(wrapper=True)
def pytest_runtestloop(session: pytest.Session) -> Generator[None, object, object]:
    """After the last test, when no server runs any more; not after an interruption, which raises."""
    result = yield
    if SESSION in session.config.stash:
        session.config.stash[SESSION].measure_ceiling()
        session.config.stash[SESSION].measure_limits()
    return result


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    cell = cells.cell_of(item)
    if cell is not None:
        item.user_properties.append((fixtures.ROW, cell))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A failed cell or link benchmark shows the end of each server's log."""
    report = yield
    session = item.config.stash.get(SESSION, None)
    ours = cells.is_beside(item) or cells.cell_of(item) is not None
    if report.failed and ours and session is not None and session.pool is not None:
        for address, tail in session.pool.log_tails().items():
            report.sections.append((f"log of server {address}", tail or "(empty)"))
    return report


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    if SESSION in config.stash:
        from genie.bench.machine import machine_facts

        machine_info["genie"] = machine_facts(config.stash[SESSION].server_slots)


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_json(config: pytest.Config, output_json: dict[str, Any]) -> None:
    """Not in ``machine_info``, which pytest-benchmark compares: a measured figure is never the same twice."""
    session = config.stash.get(SESSION, None)
    measured = {} if session is None else {"ceiling": session.ceiling, "limits": session.limits}
    if any(measured.values()):
        output_json["genie"] = {name: value for name, value in measured.items() if value}


class CellReports:
    """One row per cell, from pytest's reports (an xdist controller sees those of its workers)."""

    def __init__(self) -> None:
        self._summary = Summary()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and report.passed:
            return
        properties = dict(report.user_properties)
        for name, add in (
            (fixtures.ROW, self._summary.add),
            (fixtures.LINK, self._summary.add_link),
            (fixtures.CLIENT_COST, self._summary.add_client_cost),
        ):
            row = properties.get(name)
            if isinstance(row, dict):
                add(report.nodeid, row, report.outcome, _reason(report))

    @pytest.hookimpl(tryfirst=True)
    def pytest_terminal_summary(
        self, terminalreporter: pytest.TerminalReporter, config: pytest.Config
    ) -> None:
        session = config.stash.get(SESSION, None)
        if self._summary:
            terminalreporter.section("genie: cost of a disaggregated accelerator")
            for line in self._summary.lines(session.ceiling if session is not None else None):
                terminalreporter.write_line(line)
            for path in session.traces if session is not None else ():
                terminalreporter.write_line(f"trace: {path}")


def _reason(report: pytest.TestReport) -> str:
    """One line: why a cell was skipped, or what it raised."""
    if report.passed:
        return ""
    if isinstance(report.longrepr, tuple):
        return str(report.longrepr[2]).removeprefix("Skipped: ")
    crash = getattr(report.longrepr, "reprcrash", None)
    text = crash.message if crash is not None else str(report.longrepr)
    return next((line for line in text.splitlines() if line.strip()), "")
