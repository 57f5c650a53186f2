"""How pytest-benchmark's own tables group and scale cells: one group per workload, rows by baseline.

Plain functions with pytest-benchmark's hook signatures; ``pytest-benchmark compare`` calls them
outside any pytest run, with ``config`` None.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from pytest_benchmark import plugin

Group = tuple[str | None, list[dict[str, Any]]]


def pytest_benchmark_group_stats(config: Any, benchmarks: list[dict[str, Any]], group_by: str) -> list[Group]:
    """Groups by workload and parameters, names rows by baseline, and leaves out unverified timings."""
    benchmarks = list(benchmarks)
    if group_by != "group":
        groups: list[Group] = plugin.pytest_benchmark_group_stats(config, benchmarks, group_by)
        return groups
    grouped: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for bench in benchmarks:
        info = bench.get("extra_info") or {}
        if "workload" in info and "baseline" in info:
            if not info.get("verified", {}).get("ok"):
                continue
            bench["name"] = info["baseline"]
        grouped[bench["group"] or ""].append(bench)
    return [(name or None, rows) for name, rows in sorted(grouped.items())]


def pytest_benchmark_scale_unit(
    config: Any, unit: str, benchmarks: list[dict[str, Any]], best: Any, worst: Any, sort: str
) -> tuple[str, float]:
    """Milliseconds for cells, whatever their size, so that tables of two runs can be read side by side."""
    asked = config.getoption("benchmark_time_unit", None) if config else None
    cells = all("workload" in (bench.get("extra_info") or {}) for bench in benchmarks)
    if unit == "seconds" and asked is None and cells:
        return "m", 1e3
    scaled: tuple[str, float] = plugin.pytest_benchmark_scale_unit(
        config, unit, benchmarks, best, worst, sort
    )
    return scaled
