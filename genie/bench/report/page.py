"""From series to HTML: what the templates are given, and the page's own content security policy."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from genie.bench.ceiling import ceiling_line
from genie.bench.report import cells, numbers, plans, predictions, references, sections, tables
from genie.bench.report.cells import CellView
from genie.bench.report.facts import BESIDE, PHASES, Facts
from genie.bench.report.quantiles import CONFIDENCE, PERCENTILES, samples_needed
from genie.bench.report.series import Run, Series
from genie.bench.report.tables import Table
from genie.errors import ResultError

#: differences between two series that are named before "and n more"
MOST_DIFFERENCES = 12


@dataclass(frozen=True)
class RunView:
    """A line of the table of runs."""

    series: int
    commit: str
    branch: str
    when: str
    stamp: str
    file: str
    profile: str
    weights: str
    verified: Markup
    links: int


@dataclass(frozen=True)
class SeriesView:
    """Everything below one series' heading; the tables are None where the run has nothing for them."""

    number: int
    newest: RunView
    runs: int
    client: list[tuple[str, str]]
    devices: list[tuple[str, str]]
    ceiling: str
    gone: list[str]
    heat: Table
    history: Table | None
    workloads: list[tuple[str, list[CellView]]]
    wire: Table
    tokens: Table | None
    phases: Table
    plans: Table | None
    ablations: Table | None
    held_against: Table | None
    over_compiled: Table | None
    gpus: Table | None
    gpu_states: list[str]
    cases: list[Table]
    predictions: list[predictions.Plot]
    links: Table | None
    costs: Table


def render(series: Sequence[Series]) -> str:
    """The whole page. Needs nothing from a network: its policy forbids all but its own style and script."""
    environment = Environment(
        loader=PackageLoader("genie.bench.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    style, script = (_source(environment, name) for name in ("style.css", "script.js"))
    policy = (
        f"default-src 'none'; style-src '{_digest(style)}'; script-src '{_digest(script)}'; "
        "base-uri 'none'; form-action 'none'"
    )
    runs = [_run(run, one.number) for one in series for run in one.runs]
    return environment.get_template("report.html.j2").render(
        policy=policy,
        style=Markup(style),  # both are files of this package and nobody's input
        script=Markup(script),
        series=[_series(one) for one in series],
        runs=sorted(runs, key=lambda run: run.stamp, reverse=True),
        differs=[(one.number, *_shortened(one.differs)) for one in series if one.differs],
        legend=tables.legend(),
        phases=[*PHASES, "other"],
        needed=[(percent, samples_needed(percent)) for percent in PERCENTILES],
        confidence=f"{CONFIDENCE:.0%}",
    )


def _source(environment: Environment, name: str) -> str:
    assert environment.loader is not None
    return environment.loader.get_source(environment, name)[0]


def _digest(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _shortened(lines: Sequence[str]) -> tuple[list[str], int]:
    return list(lines[:MOST_DIFFERENCES]), max(0, len(lines) - MOST_DIFFERENCES)


def _run(run: Run, number: int) -> RunView:
    result, found = run.result, list(run.facts.values())
    return RunView(
        series=number,
        commit=run.commit,
        branch=result.branch,
        when=numbers.moment(result.when),
        stamp=result.when,
        file=result.path.name,
        profile=_list(facts.cell.profile for facts in found),
        weights=_list(facts.weights for facts in found if not facts.is_beside) or "none",
        verified=sections.facts_note(run.cells),
        links=sum(facts.link is not None for facts in found),
    )


def _series(series: Series) -> SeriesView:
    run = series.newest
    anchors = cells.anchors_of(series)
    workloads = [
        (group, [cells.view(series, facts, anchors[facts.cell.id]) for facts in found])
        for group, found in sections.by_workload(run)
    ]
    for name in BESIDE:
        beside = [facts for facts in run.facts.values() if facts.cell.workload == name]
        if beside:
            found = [cells.view(series, facts, anchors[facts.cell.id]) for facts in beside]
            workloads.append((name.replace("_", " "), found))
    if series.gone:
        gone = [cells.view(series, facts, anchors[facts.cell.id]) for facts in series.gone]
        workloads.append(("not in the newest run", gone))
    return SeriesView(
        number=series.number,
        newest=_run(run, series.number),
        runs=len(series.runs),
        client=_client(run),
        devices=_devices(run),
        ceiling=_ceiling(run),
        gone=[facts.cell.name for facts in series.gone],
        heat=sections.heat_map(series, anchors),
        history=sections.history(series, anchors),
        workloads=workloads,
        wire=sections.wire(series),
        tokens=sections.tokens(series),
        phases=sections.phases(series),
        plans=plans.plans(series),
        ablations=sections.ablations(series),
        held_against=sections.held_against(series),
        over_compiled=references.over_compiled(series),
        gpus=references.gpus(series),
        gpu_states=references.gpu_states(run),
        cases=sections.cases(series),
        predictions=predictions.predictions(series),
        links=sections.links(series, anchors),
        costs=sections.costs(series),
    )


def _client(run: Run) -> list[tuple[str, str]]:
    """The host that measured; one, because all cells of a run come from one process."""
    client = next((facts.fingerprint.get("client") for facts in run.facts.values()), None) or {}
    return [(name.replace("_", " "), _told(value)) for name, value in client.items()]


def _devices(run: Run) -> list[tuple[str, str]]:
    """Which rows may use which devices, in words; rows with the same devices together."""
    rows: dict[str, list[str]] = {}
    for facts in run.cells:
        rows.setdefault(_pool(facts), []).append(facts.cell.label)
    return [(", ".join(dict.fromkeys(labels)), pool) for pool, labels in rows.items()]


def _pool(facts: Facts) -> str:
    told = [_told(device) for device in facts.fingerprint.get("devices") or ()]
    return (
        "; ".join(f"{told.count(one)} {numbers.TIMES} ({one})" for one in dict.fromkeys(told))
        or "not recorded"
    )


def _told(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {inner}" for key, inner in value.items() if inner is not None)
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return numbers.ABSENT if value is None else str(value)


def _ceiling(run: Run) -> str:
    if run.result.ceiling is None:
        return ""
    try:
        return ceiling_line(dict(run.result.ceiling))
    except (KeyError, TypeError, ValueError) as error:
        raise ResultError(
            f"{run.result.path}: the ceiling cannot be read ({type(error).__name__}: {error}): the file is "
            "damaged; run the suite again"
        ) from None


def _list(values: Any) -> str:
    return ", ".join(sorted(set(values)))
