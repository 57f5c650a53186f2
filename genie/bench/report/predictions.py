"""The cost model's predictions beside measured times: a plot for each row of the microbenchmark."""

from __future__ import annotations

from dataclasses import dataclass

from markupsafe import Markup

from genie.bench.report import charts
from genie.bench.report.facts import Facts
from genie.bench.report.series import Series

#: by which measured times are told
_CLOCKS = {"cpu": "CPU-seconds of the server", "wall": "wall clock on the server"}


@dataclass(frozen=True)
class Plot:
    label: str
    told: str
    chart: Markup


def predictions(series: Series) -> list[Plot]:
    """One for each row that has predicted cases; none where no device was calibrated."""
    return [_plot(facts) for facts in series.newest.cells if facts.predictions]


def _plot(facts: Facts) -> Plot:
    held_out = [p for p in facts.predictions if p.held_out]
    told = f"{len(facts.predictions)} ops and sizes, {len(held_out)} of them held out from the fit"
    if facts.cost_mape is not None:
        told += f". Of these: mean absolute error {facts.cost_mape:.0f} %"
        if facts.cost_spearman is not None:
            told += f", rank correlation {facts.cost_spearman:.2f}"
    if facts.cost_clock:
        told += f" (measured in {_CLOCKS.get(facts.cost_clock, facts.cost_clock)})"
    points = [
        charts.ScatterPoint(
            p.measured_ms * 1e-3,
            p.predicted_ms * 1e-3,
            "held" if p.held_out else "dot",
            f"{p.case}: measured {p.measured_ms:.3g} ms, predicted {p.predicted_ms:.3g} ms",
        )
        for p in facts.predictions
    ]
    return Plot(facts.cell.label, told + ".", charts.scatter(points, "Predicted against measured time"))
