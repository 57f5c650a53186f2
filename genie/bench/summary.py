"""The tables at the end of a run: one per workload, one row per baseline, 120 columns at most.

After them the tables of the link and of what the client costs, and what several devices reach at best on
this machine.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from genie.bench.ceiling import ceiling_line
from genie.bench.options import ROWS
from genie.config import FEATURES

COLUMNS = (
    "baseline",
    "median",
    "IQR",
    "x local",
    "TTFT",
    "TPOT",
    "out/req",
    "in/req",
    "trips",
    "dev",
    "verified",
)
COST_COLUMNS = ("cost of the client", "genie", "eager", "ratio", "target", "bytes/token", "trips/token")
LINK_COLUMNS = ("link", "genie", "raw socket", "ratio")
#: a reason longer than this is cut; pytest's own report of the failure has all of it
REASON_WIDTH = 108


class Summary:
    """Rows collected from pytest's reports, so that those of xdist workers are in it too."""

    def __init__(self) -> None:
        self._rows: dict[str, dict[str, Any]] = {}
        self._links: dict[str, dict[str, Any]] = {}
        self._costs: dict[str, dict[str, Any]] = {}

    def __bool__(self) -> bool:
        return bool(self._rows or self._links or self._costs)

    def add(self, nodeid: str, row: dict[str, Any], outcome: str, reason: str) -> None:
        """The first failure or skip of a cell stays; a later phase that passed does not hide it."""
        from genie.bench.results import cell_label  # brings torch, which a run without cells does not need

        named = {**row, "label": cell_label(row), "outcome": outcome, "reason": reason}
        _keep_first_failure(self._rows, nodeid, named)

    def add_link(self, nodeid: str, row: dict[str, Any], outcome: str, reason: str) -> None:
        """A benchmark of the link, which is no cell; ``add``'s rule holds."""
        named = {**row, "label": row["case"], "outcome": outcome, "reason": reason}
        _keep_first_failure(self._links, nodeid, named)

    def add_client_cost(self, nodeid: str, row: dict[str, Any], outcome: str, reason: str) -> None:
        """A benchmark of what the client costs, which is no cell; ``add``'s rule holds."""
        label = ", ".join(row[key] for key in ("case", "capture") if key in row)
        named = {**row, "label": label, "outcome": outcome, "reason": reason}
        _keep_first_failure(self._costs, nodeid, named)

    def lines(self, ceiling: dict[str, Any] | None = None) -> list[str]:
        """The tables as plain text; ``ceiling`` as genie.bench.ceiling measured it."""
        lines: list[str] = []
        for group, rows in self._groups().items():
            lines += ["", group, *_table([_cells(row) for row in rows]), *_reasons(rows)]
        if self._links:
            links = list(self._links.values())
            lines += ["", *_aligned(LINK_COLUMNS, map(_link_cells, links)), *_reasons(links)]
        if self._costs:
            costs = list(self._costs.values())
            lines += ["", *_aligned(COST_COLUMNS, map(_cost_cells, costs)), *_reasons(costs)]
        if self._rows:
            lines += ["", self._totals()]
        if ceiling is not None:
            lines += [ceiling_line(ceiling)]
        return lines[1:]

    def _groups(self) -> dict[str, list[dict[str, Any]]]:
        groups: dict[str, list[dict[str, Any]]] = {}
        for row in self._rows.values():
            name = row["workload"] + "".join(
                f" {key}={value}" for key, value in sorted(row["params"].items())
            )
            groups.setdefault(name, []).append(row)
        for rows in groups.values():
            rows.sort(key=_rank)
        return groups

    def _totals(self) -> str:
        outcomes = [row["outcome"] for row in self._rows.values()]
        timed = sum(
            row.get("median_s") is not None for row in self._rows.values() if row["outcome"] == "passed"
        )
        passed = outcomes.count("passed")
        return (
            f"{len(outcomes)} cells: {passed} verified ({timed} timed), "
            f"{outcomes.count('failed')} failed, {outcomes.count('skipped')} skipped"
        )


def _keep_first_failure(rows: dict[str, dict[str, Any]], nodeid: str, row: dict[str, Any]) -> None:
    known = rows.get(nodeid)
    if known is None or known["outcome"] == "passed":
        rows[nodeid] = row


def _rank(row: dict[str, Any]) -> tuple[int, list[int]]:
    """The seven as in the schema, each before its rows without a feature; then those of the user."""
    baseline = row["baseline"]
    place = ROWS.index(baseline) if baseline in ROWS else len(ROWS)
    return place, [FEATURES.index(feature) for feature in row["ablated"]]


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    if row["outcome"] != "passed":
        mark = "FAILED" if row["outcome"] == "failed" else "skipped"
        return (row["label"], *["-"] * (len(COLUMNS) - 2), mark)
    if "wire" not in row:
        return (row["label"], *["-"] * (len(COLUMNS) - 2), "not measured")
    wire = row["wire"]
    return (
        row["label"],
        _seconds(row["median_s"]),
        _seconds(row["iqr_s"]),
        "-" if row["ratio"] is None else f"{row['ratio']:.2f}",
        _milliseconds(row["ttft_ms"]),
        _milliseconds(row["tpot_ms"]),
        _bytes(wire["bytes_out"]),
        _bytes(wire["bytes_in"]),
        "-" if wire["round_trips"] is None else str(wire["round_trips"]),
        str(row["devices"]),
        f"ok ({row['verified']})",
    )


def _link_cells(row: dict[str, Any]) -> tuple[str, ...]:
    if row["outcome"] != "passed":
        return (row["case"], "-", "-", "FAILED" if row["outcome"] == "failed" else "skipped")
    if row.get("median_s") is None:
        return (row["case"], "-", "-", "not measured")
    if "throughput_ratio" in row:
        ours, raw = (f"{row[key] / 1e9:.2f} GB/s" for key in ("bytes_per_s", "raw_bytes_per_s"))
        return (row["case"], ours, raw, f"{row['throughput_ratio']:.0%} of its throughput")
    times = _seconds(row["median_s"]), _seconds(row["raw_median_s"])
    return (row["case"], *times, f"{row['time_ratio']:.2f}x its time")


def _cost_cells(row: dict[str, Any]) -> tuple[str, ...]:
    if row["outcome"] != "passed":
        mark = "FAILED" if row["outcome"] == "failed" else "skipped"
        return (row["label"], *["-"] * (len(COST_COLUMNS) - 2), mark)
    if row.get("median_s") is None:
        return (row["label"], *["-"] * (len(COST_COLUMNS) - 2), "not measured")
    if row["target_s"] is not None:
        target, met = f"<= {_seconds(row['target_s'])}", row["median_s"] <= row["target_s"]
    elif row["target_ratio"] is not None:
        target, met = f"<= {row['target_ratio']:g}x", row["ratio"] <= row["target_ratio"]
    else:
        target, met = "-", True
    tokens = row["bytes_per_token"], row["trips_per_token"]
    return (
        row["label"],
        f"{_seconds(row['median_s'])}/{row['unit']}",
        _seconds(row["eager_median_s"]),
        f"{row['ratio']:.2f}x",
        target + ("" if met else " missed"),
        *("-" if value is None else f"{value:.0f}" for value in tokens),
    )


def _reasons(rows: Iterable[dict[str, Any]]) -> list[str]:
    lines = []
    for row in rows:
        if row["outcome"] != "passed":
            reason = row["reason"] or "no reason given"
            cut = reason if len(reason) <= REASON_WIDTH else reason[: REASON_WIDTH - 3] + "..."
            lines += [f"  {row['label']} {row['outcome']}:", f"    {cut}"]
    return lines


def _table(rows: list[tuple[str, ...]]) -> list[str]:
    # Columns in which no row has anything (TTFT outside decode) are left out.
    used = [
        number
        for number, name in enumerate(COLUMNS)
        if name not in ("TTFT", "TPOT") or any(row[number] != "-" for row in rows)
    ]
    return _aligned(
        tuple(COLUMNS[number] for number in used), (tuple(row[number] for number in used) for row in rows)
    )


def _aligned(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> list[str]:
    """The first column to the left, the others to the right, a rule below the head."""
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]

    def line(row: tuple[str, ...]) -> str:
        first, *rest = (
            cell.rjust(width) if number else cell.ljust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        return "  " + "  ".join([first, *rest])

    return [line(head), "  " + "-" * (sum(widths) + 2 * (len(widths) - 1)), *map(line, rows)]


def _seconds(value: float | None) -> str:
    return "-" if value is None else _milliseconds(value * 1e3)


def _milliseconds(value: float | None) -> str:
    if value is None:
        return "-"
    if value >= 10_000:
        return f"{value / 1e3:.2f} s"
    digits = 1 if value >= 100 else 2 if value >= 1 else 3
    return f"{value:.{digits}f} ms"


def _bytes(value: int | None) -> str:
    if value is None:
        return "-"
    size = float(value)
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.2f} GiB"
