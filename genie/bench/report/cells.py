"""One cell in detail: samples, percentiles, its own history, and the proof behind it."""

from __future__ import annotations

from dataclasses import dataclass

from markupsafe import Markup

from genie.bench.report import charts, numbers, tables
from genie.bench.report.facts import Facts
from genie.bench.report.quantiles import percentiles
from genie.bench.report.series import Run, Series
from genie.bench.report.tables import Table, Td

NO_SAMPLES = "no samples stored"


@dataclass(frozen=True)
class CellView:
    """What the template shows of a cell. ``trend`` is None where it was measured once."""

    anchor: str
    label: str
    group: str
    summary: str
    verified: bool
    histogram: Markup | None
    quantiles: Table
    trend: Markup | None
    runs: Table | None
    samples: str
    about: list[tuple[str, str]]


def anchors_of(series: Series) -> dict[str, str]:
    """Fragment by cell id, for the cells of the newest run and those that it lacks."""
    ids = [*series.newest.facts, *(facts.cell.id for facts in series.gone)]
    return {id_: f"cell-{series.number}-{index}" for index, id_ in enumerate(ids, 1)}


def view(series: Series, facts: Facts, anchor: str) -> CellView:
    cell = facts.cell
    past = series.history(cell.id)
    ratio = "" if facts.ratio is None else f", {numbers.times(facts.ratio)} of local"
    return CellView(
        anchor=anchor,
        label=cell.label if not facts.is_beside else cell.group,
        group=cell.group,
        summary=f"median {numbers.seconds(cell.median_s)}{ratio}",
        verified=facts.verified,
        histogram=charts.histogram(cell.samples_s, cell.median_s, numbers.seconds)
        if cell.samples_s
        else None,
        quantiles=_quantiles(facts, anchor),
        trend=_trend(past) if len(past) > 1 else None,
        runs=_runs(past, anchor) if len(past) > 1 else None,
        samples=", ".join(f"{value * 1e3:.4g}" for value in cell.samples_s),
        about=_about(facts),
    )


def _quantiles(facts: Facts, anchor: str) -> Table:
    rows = [[tables.text("min"), tables.seconds(facts.min_s), tables.text("")]]
    for one in percentiles(facts.cell.samples_s):
        why = one.why if facts.cell.samples_s else NO_SAMPLES
        bound = "" if one.upper_s is None else f"at most {numbers.seconds(one.upper_s)}"
        rows.append([tables.text(f"p{one.percent}"), tables.seconds(one.value_s), tables.text(bound or why)])
    rows.append([tables.text("max"), tables.seconds(facts.max_s), tables.text("")])
    number = len(facts.cell.samples_s)
    caption = f"Quantiles of {number} {'sample' if number == 1 else 'samples'}" if number else "Quantiles"
    return Table(f"q-{anchor}", caption, ["quantile", "latency", "95% confidence"], [("", rows)], kind="slim")


def _trend(past: list[tuple[Run, Facts]]) -> Markup:
    points = [
        charts.TrendPoint(
            run.commit,
            facts.cell.median_s,
            facts.q1_s,
            facts.q3_s,
            f"{run.commit}, {numbers.moment(run.result.when)}: "
            f"median {numbers.seconds(facts.cell.median_s)}, "
            f"quartiles {numbers.seconds(facts.q1_s)} and {numbers.seconds(facts.q3_s)}",
        )
        for run, facts in past
    ]
    return charts.trend(points, numbers.seconds)


def _runs(past: list[tuple[Run, Facts]], anchor: str) -> Table:
    rows = [
        [
            tables.text(run.commit),
            tables.text(numbers.moment(run.result.when)),
            tables.seconds(facts.cell.median_s),
            Td(f"{numbers.seconds(facts.q1_s)} to {numbers.seconds(facts.q3_s)}"),
            Td(numbers.times(facts.ratio), facts.ratio),
            tables.size(facts.bytes),
        ]
        for run, facts in reversed(past)
    ]
    return Table(
        f"r-{anchor}",
        "Newest first",
        ["commit", "run", "median", "quartiles", "of local", "bytes"],
        [("", rows)],
    )


def _about(facts: Facts) -> list[tuple[str, str]]:
    """Terms and their values; those that do not apply are left out."""
    error = "" if facts.max_abs_err is None else f", largest error {facts.max_abs_err:.3g}"
    verified = (
        f"by {facts.verified_by}{error}"
        if facts.verified
        else f"NOT verified (by {facts.verified_by}{error})"
    )
    tokens = facts.tokens
    listed = [
        ("verified", verified),
        ("wire", f"{numbers.size(facts.bytes_out)} out, {numbers.size(facts.bytes_in)} in, "
                 f"{numbers.count(facts.round_trips)} round trips"),
        ("model", facts.model),
        ("weights", f"{facts.weights} {facts.weights_sha256[:12]}".strip()),
        ("ran on", facts.device_name),
        ("devices", numbers.count(facts.devices)),
        ("ops", "" if facts.ops is None else numbers.count(facts.ops)),
        ("features on", ", ".join(facts.features)),
        ("features off", ", ".join(facts.ablated)),
        ("tokens", "" if tokens is None else f"TTFT {numbers.milliseconds(tokens.ttft_ms)}, "
                   f"TPOT {numbers.milliseconds(tokens.tpot_ms)}, {tokens.tokens} tokens"),
    ]  # fmt: skip
    return [(term, value) for term, value in listed if value]
