"""How genie_full was scheduled, and how well its time was predicted."""

from __future__ import annotations

from genie.bench.report import numbers, tables
from genie.bench.report.facts import Facts
from genie.bench.report.sections import grouped
from genie.bench.report.series import Series
from genie.bench.report.tables import Table, Td


def plans(series: Series) -> Table | None:
    """One row per cell whose windows were planned; None where the newest run has none."""
    groups = grouped(series.newest, _row)
    if not groups:
        return None
    return Table(
        f"plans-{series.number}",
        "What the scheduler decided for a request, and the time it predicted for that beside the request's "
        "median. The prediction is of servers and links alone: capturing on the client is not in it.",
        ["row", "plan", "windows", "devices", "predicted", "measured", "error", "why"],
        groups,
        sortable=True,
    )


def _row(facts: Facts) -> list[Td] | None:
    plan = facts.plan
    if plan is None:
        return None
    followed = ", ".join(
        f"{name} {numbers.TIMES}{count}" if count > 1 else name for name, count in plan.policies
    )
    predicted = plan.predicted_ms
    error = None if predicted is None else predicted / plan.measured_ms
    return [
        tables.text(facts.cell.label),
        tables.text(followed),
        tables.count(plan.windows),
        tables.count(facts.devices),
        tables.milliseconds(predicted) if predicted is not None else Td(numbers.DASH, hint="no cost model"),
        tables.milliseconds(plan.measured_ms),
        Td(numbers.DASH) if error is None else Td(numbers.percent(error), error),
        tables.text(plan.why),
    ]
