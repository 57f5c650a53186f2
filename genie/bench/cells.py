"""From ``@pytest.mark.genie_workload(...)`` to cells: which there are, their ids, and their order."""

from __future__ import annotations

from typing import Any

import pytest

from genie.bench.options import BASELINES
from genie.bench.session import OPTIONS, session_of

MARKER = "genie_workload"
MARKER_HELP = (
    "genie_workload(workload, **more): measures a workload on every baseline; `workload` is a registered "
    "name or a factory (a bare class needs genie_workload.with_args(factory): pytest would take it for what "
    "is marked), and `more` maps a profile to a list of further parameters, one extra test each"
)
#: cells of the peers come last: the idle processes of their pools would disturb the others
LATE_STAGES = {"pytorch_rpc": 1, "ray": 2}
NO_CHECKPOINT = "single ops have no checkpoint: the microbenchmark is measured with seeded weights"
#: the link benchmarks belong to it
LINK_BASELINE = "genie_local_remote"


def make_cells(metafunc: pytest.Metafunc) -> None:
    """One test per selected baseline and parameter set; the default parameters have the plain id."""
    marker = metafunc.definition.get_closest_marker(MARKER)
    if marker is None:
        return
    from genie.bench.clock import cell_clock

    session = session_of(metafunc.config)
    sets: list[dict[str, Any]] = [{}, *marker.kwargs.get(session.profile, [])]
    marks = [pytest.mark.benchmark(timer=cell_clock)]
    if marker.args[0] == "microbenchmark" and session.options.weights != "seeded":
        # Before any fixture: no server starts for a cell that cannot run.
        marks.append(pytest.mark.skip(f"{NO_CHECKPOINT}, not --genie-weights {session.options.weights}"))
    cells = []
    for params in sets:
        suffix = "".join(f"-{name}{value}" for name, value in params.items())
        for baseline in session.options.baselines:
            cells.append(pytest.param(baseline, params, id=baseline + suffix, marks=marks))
    metafunc.parametrize(("baseline", "workload"), cells, indirect=True)


def cell_of(item: pytest.Item) -> dict[str, Any] | None:
    """Workload, parameters and baseline of a test that is a cell; None for any other test."""
    marker = item.get_closest_marker(MARKER)
    callspec = getattr(item, "callspec", None)
    if marker is None or callspec is None or "baseline" not in callspec.params:
        return None
    source = marker.args[0]
    return {
        "workload": source if isinstance(source, str) else getattr(source, "__name__", str(source)),
        "baseline": callspec.params["baseline"],
        "params": dict(callspec.params["workload"]),
    }


def with_selected_links(config: pytest.Config, items: list[pytest.Item]) -> list[pytest.Item]:
    """``items``, their link benchmarks on the cells' clock, or without them if their baseline is not run."""
    from genie.bench.clock import cell_clock

    links = [item for item in items if is_link(item)]
    if links and LINK_BASELINE not in config.stash[OPTIONS].baselines:
        config.hook.pytest_deselected(items=links)
        return [item for item in items if item not in links]
    for item in links:
        item.add_marker(pytest.mark.benchmark(timer=cell_clock))
    return items


def is_link(item: pytest.Item) -> bool:
    """A benchmark of the link: no cell, but it uses the servers."""
    return "genie_link" in getattr(item, "fixturenames", ())


def in_run_order(items: list[pytest.Item]) -> list[pytest.Item]:
    """Tests that are no cells first, as they were; then cells workload by workload, the peers' last."""
    cells = [(item, cell) for item in items if (cell := cell_of(item)) is not None]
    groups = list(dict.fromkeys(_group(cell) for _, cell in cells))

    def place(pair: tuple[pytest.Item, dict[str, Any]]) -> tuple[int, int, int]:
        baseline = pair[1]["baseline"]
        order = BASELINES.index(baseline) if baseline in BASELINES else len(BASELINES)
        return LATE_STAGES.get(baseline, 0), groups.index(_group(pair[1])), order

    ordered = [item for item, _ in sorted(cells, key=place)]
    chosen = set(ordered)
    return [item for item in items if item not in chosen] + ordered


def _group(cell: dict[str, Any]) -> str:
    return f"{cell['workload']} {sorted(cell['params'].items())}"
