"""From ``@pytest.mark.genie_workload(...)`` to cells: which there are, their ids, and their order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from genie.bench.options import ROWS, Options, require_baselines
from genie.bench.session import OPTIONS, BenchSession, session_of
from genie.config import IMPLEMENTED_FEATURES

MARKER = "genie_workload"
MARKER_HELP = (
    "genie_workload(workload, **more): measures a workload on every baseline; `workload` is a registered "
    "name or a factory (a bare class needs genie_workload.with_args(factory): pytest would take it for what "
    "is marked), and `more` maps a profile to a list of further parameters, one extra test each"
)
#: cells of the peers come last: the idle processes of their pools would disturb the others
LATE_STAGES = {"pytorch_rpc": 1, "ray": 2}
#: why a reference has no cell for a workload
NO_REFERENCE = {
    ("local_compiled", "microbenchmark"): "single ops: there is nothing to fuse or to launch together, and "
    "compiled they call the same library kernels; their reference is local_pytorch"
}
NO_CHECKPOINT = "single ops have no checkpoint: the microbenchmark is measured with seeded weights"
GATED_HELP = "genie_gated: no cell, but measured by `genie gate --against` in each process: has to be short"
PROFILES = "genie_profiles"
PROFILES_HELP = "genie_profiles(*names): a client-cost benchmark that runs at these profiles only"
#: the link benchmarks and the lazy client-cost benchmarks belong to it
LINK_BASELINE = "genie_local_remote"
#: between baseline and feature in the id of a row that has the feature switched off
WITHOUT = "-no_"
#: the baseline whose features can be switched off
ABLATABLE = "genie_full"


def make_cells(metafunc: pytest.Metafunc) -> None:
    """One test per selected row and parameter set; the default parameters have the plain id."""
    marker = metafunc.definition.get_closest_marker(MARKER)
    if marker is None:
        return
    from genie.bench.clock import cell_clock

    session = session_of(metafunc.config)
    _check_rounds(session)
    sets: list[dict[str, Any]] = [{}, *marker.kwargs.get(session.profile, [])]
    marks = [pytest.mark.benchmark(timer=cell_clock)]
    if marker.args[0] == "microbenchmark" and session.options.weights != "seeded":
        # Before any fixture: no server starts for a cell that cannot run.
        marks.append(pytest.mark.skip(f"{NO_CHECKPOINT}, not --genie-weights {session.options.weights}"))
    try:
        own = own_baselines(metafunc.config, metafunc.definition.ihook)
        rows = rows_of(session.options, own, session.profile)
    except pytest.UsageError as error:
        raise pytest.Collector.CollectError(str(error)) from None  # pytest shows it without a traceback
    cells = []
    for params in sets:
        suffix = "".join(f"-{name}{value}" for name, value in params.items())
        for row in rows:
            absent = NO_REFERENCE.get((row, marker.args[0])) if isinstance(marker.args[0], str) else None
            skip = [pytest.mark.skip(f"{row}: {absent}")] if absent else []
            cells.append(pytest.param(row, params, id=row + suffix, marks=[*marks, *skip]))
    metafunc.parametrize(("baseline", "workload"), cells, indirect=True)


def own_baselines(config: pytest.Config, hook: Any) -> tuple[str, ...]:
    """What the user adds to the seven: in all that ``hook`` sees, or only in what counts for one file.

    Raises UsageError for a name that cannot be a baseline's.
    """
    names: list[str] = []
    for added in hook.pytest_genie_baselines(config=config):
        if isinstance(added, str):
            raise pytest.UsageError(
                f"pytest_genie_baselines returned {added!r}: return a list of names, [{added!r}]"
            )
        names += added
    for name in names:
        if name in ROWS or not str(name).isidentifier():
            raise pytest.UsageError(
                f"pytest_genie_baselines: {name!r} is taken or is no name of a fixture: give another one"
            )
    return tuple(dict.fromkeys(names))


def require_selected(config: pytest.Config) -> None:
    """After collection, when every hook is known. Raises UsageError for an unknown ``--genie-baselines``."""
    asked = config.stash[OPTIONS].own_baselines
    if asked:
        require_baselines(asked, own_baselines(config, config.hook))


def rows_of(options: Options, own: Sequence[str] = (), profile: str = "") -> list[str]:
    """Ids of the rows: the selected baselines and references, ``genie_full`` without each feature if asked
    for, ``own``."""
    rows = []
    for baseline in options.rows(profile):
        rows.append(baseline)
        if baseline == ABLATABLE and options.ablate_each:
            rows += [f"{baseline}{WITHOUT}{feature}" for feature in IMPLEMENTED_FEATURES]
    return rows + [name for name in own if options.own_baselines is None or name in options.own_baselines]


def baseline_of(row: str) -> str:
    """The baseline that runs in a row."""
    return row.partition(WITHOUT)[0]


def ablated_in(row: str, options: Options) -> list[str]:
    """Features switched off in a row; empty for every baseline but ``genie_full``."""
    baseline, _, feature = row.partition(WITHOUT)
    if feature:
        return [feature]
    return sorted(options.ablate) if baseline == ABLATABLE else []


def _check_rounds(session: BenchSession) -> None:
    from genie.workloads import WORKLOADS

    unknown = sorted(session.options.rounds.keys() - {"", *WORKLOADS})
    if unknown:
        raise pytest.UsageError(
            f"--genie-rounds: unknown workload {', '.join(unknown)}; choose from {', '.join(WORKLOADS)}"
        )


def cell_of(item: pytest.Item) -> dict[str, Any] | None:
    """Workload, parameters, baseline and what it lacks, of a test that is a cell; None for any other."""
    marker = item.get_closest_marker(MARKER)
    callspec = getattr(item, "callspec", None)
    if marker is None or callspec is None or "baseline" not in callspec.params:
        return None
    source, row = marker.args[0], callspec.params["baseline"]
    if not isinstance(row, str):  # pytest's stand-in for an empty list of rows, which it skips
        return None
    return {
        "workload": source if isinstance(source, str) else getattr(source, "__name__", str(source)),
        "baseline": baseline_of(row),
        "ablated": ablated_in(row, item.config.stash[OPTIONS]),
        "params": dict(callspec.params["workload"]),
    }


def with_selected_beside(config: pytest.Config, items: list[pytest.Item]) -> list[pytest.Item]:
    """``items``, their benchmarks beside the cells on the cells' clock, or without those whose baseline is
    not run or that belong to other profiles."""
    from genie.bench.clock import cell_clock

    beside = [item for item in items if is_beside(item)]
    left_out = [item for item in beside if not _is_selected(config, item)]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
    for item in beside:
        item.add_marker(pytest.mark.benchmark(timer=cell_clock))
    return [item for item in items if item not in left_out]


def _is_selected(config: pytest.Config, item: pytest.Item) -> bool:
    marker = item.get_closest_marker(PROFILES)
    if marker is not None and session_of(config).profile not in marker.args:
        return False
    callspec = getattr(item, "callspec", None)
    replayed = callspec is not None and callspec.params.get("capture") == "replayed"
    return (ABLATABLE if replayed else LINK_BASELINE) in config.stash[OPTIONS].baselines


def is_link(item: pytest.Item) -> bool:
    """A benchmark of the link: no cell, but it uses the servers."""
    return "genie_link" in getattr(item, "fixturenames", ())


def is_beside(item: pytest.Item) -> bool:
    """A benchmark of the link, or of what the client costs."""
    return is_link(item) or "client_cost" in getattr(item, "fixturenames", ())


def in_run_order(items: list[pytest.Item]) -> list[pytest.Item]:
    """Tests that are no cells first, as they were; then cells workload by workload, the peers' last."""
    cells = [(item, cell) for item in items if (cell := cell_of(item)) is not None]
    groups = list(dict.fromkeys(_group(cell) for _, cell in cells))

    def place(pair: tuple[pytest.Item, dict[str, Any]]) -> tuple[int, int, int]:
        baseline = pair[1]["baseline"]
        order = ROWS.index(baseline) if baseline in ROWS else len(ROWS)
        return LATE_STAGES.get(baseline, 0), groups.index(_group(pair[1])), order

    ordered = [item for item, _ in sorted(cells, key=place)]
    chosen = set(ordered)
    return [item for item in items if item not in chosen] + ordered


def _group(cell: dict[str, Any]) -> str:
    return f"{cell['workload']} {sorted(cell['params'].items())}"
