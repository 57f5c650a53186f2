"""How pytest-benchmark's own tables group and scale cells: one group per workload, rows by baseline.

Plain functions with pytest-benchmark's hook signatures; ``pytest-benchmark compare`` calls them
outside any pytest run, with ``config`` None.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pytest_benchmark import plugin

from genie.bench.comparing import cells_of, is_ours, refusal
from genie.errors import ResultError

Group = tuple[str | None, list[dict[str, Any]]]
LINK, CLIENT_COST = "link", "client_cost"
#: rows beside the matrix, all faster than this (s), are told in microseconds: a histogram's axis has whole
#: numbers
SMALL_S = 1e-3


def pytest_benchmark_group_stats(config: Any, benchmarks: list[dict[str, Any]], group_by: str) -> list[Group]:
    """Groups by workload and parameters, names rows by what ran, and leaves out unverified timings.

    pytest-benchmark adds the source to a row's name where there are several. Ends the program with a
    message when stored results may not be compared (a run checks that itself).
    """
    benchmarks = list(benchmarks)
    if config is None:
        require_comparable(benchmarks)
    if group_by != "group":
        groups: list[Group] = plugin.pytest_benchmark_group_stats(config, benchmarks, group_by)
        return groups
    grouped: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for bench in benchmarks:
        if is_ours(bench):
            if not bench["extra_info"].get("verified", {}).get("ok"):
                continue
            bench["name"] = row_name(bench["extra_info"])
        grouped[bench["group"] or ""].append(bench)
    return [(name or None, rows) for name, rows in sorted(grouped.items())]


def pytest_benchmark_scale_unit(
    config: Any, unit: str, benchmarks: list[dict[str, Any]], best: Any, worst: Any, sort: str
) -> tuple[str, float]:
    """Milliseconds for cells, whatever their size, so that tables of two runs can be read side by side."""
    asked = config.getoption("benchmark_time_unit", None) if config else None
    if unit == "seconds" and asked is None and all(map(is_ours, benchmarks)):
        beside = all(bench["extra_info"]["workload"] in (LINK, CLIENT_COST) for bench in benchmarks)
        return ("u", 1e6) if beside and worst["median"] < SMALL_S else ("m", 1e3)
    scaled: tuple[str, float] = plugin.pytest_benchmark_scale_unit(
        config, unit, benchmarks, best, worst, sort
    )
    return scaled


def row_name(info: dict[str, Any]) -> str:
    """The baseline and what it lacks; for a benchmark of the link, whose link it is; of the client, how its
    programs came to be."""
    from genie.bench.results import cell_label

    if info["workload"] == CLIENT_COST:
        return str(info["client_cost"]["capture"])
    return "genie connection" if info["workload"] == LINK else cell_label(info)


def require_comparable(benchmarks: Iterable[dict[str, Any]]) -> None:
    """Raises SystemExit with a message when the files that these came from may not be compared."""
    files: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for bench in benchmarks:
        # `pytest-benchmark compare` has moved the statistics into the benchmark.
        files[bench["path"]].append({**bench, "stats": bench})
    names = [Path(path).name for path in files]
    try:
        reason = refusal(
            (Path(path).name if names.count(Path(path).name) == 1 else path, cells_of(rows, Path(path)))
            for path, rows in files.items()
        )
    except ResultError as error:
        reason = str(error)
    if reason:
        raise SystemExit(f"ERROR: {reason}")
