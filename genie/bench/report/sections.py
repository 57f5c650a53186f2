"""The tables of one series: what its newest run says, and how it came there."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from markupsafe import Markup

from genie.bench.options import REFERENCES, ROWS
from genie.bench.report import charts, numbers, tables
from genie.bench.report.facts import PHASES, SETUP, Facts, case_ratio
from genie.bench.report.series import Run, Series
from genie.bench.report.tables import Table, Td

LOCAL, FULL = "local_pytorch", "genie_full"
#: what genie_full is held against, and what that row lacks
HELD_AGAINST = {
    "genie_no_semantics": "no feature, same pool",
    "genie_local_remote": "one server",
}


def by_workload(run: Run) -> list[tuple[str, list[Facts]]]:
    """Cells by group (workload and parameters), rows in the order of the baselines."""
    groups: dict[str, list[Facts]] = {}
    for facts in run.cells:
        groups.setdefault(facts.cell.group, []).append(facts)
    return [(group, sorted(groups[group], key=_row)) for group in sorted(groups)]


def rows_of(run: Run) -> list[str]:
    """Labels of the run's rows, ablated ones after the baseline they are made from."""
    return list(dict.fromkeys(facts.cell.label for facts in sorted(run.cells, key=_row)))


def heat_map(series: Series, anchors: dict[str, str]) -> Table:
    """Ratio to local_pytorch of the same run, baseline by workload; each figure leads to its cell."""
    workloads = by_workload(series.newest)
    found = {(facts.cell.label, group): facts for group, cells in workloads for facts in cells}

    def cell(label: str, group: str) -> Td:
        facts = found.get((label, group))
        if facts is None:
            return Td(numbers.DASH, hint="not in this run")
        if facts.ratio is None:
            return Td(numbers.ABSENT, href=anchors[facts.cell.id], hint="no local_pytorch in this run")
        return tables.ratio(
            facts.ratio, anchors[facts.cell.id], f"median {numbers.seconds(facts.cell.median_s)}"
        )

    rows = [
        [
            tables.text(f"{label} (reference)" if label in REFERENCES else label),
            *(cell(label, group) for group, _ in workloads),
        ]
        for label in rows_of(series.newest)
    ]
    return Table(
        f"heat-{series.number}",
        "Time of a request over that of local_pytorch in the same run: below 1 is faster. For the "
        "microbenchmark the median over its ops.",
        ["baseline", *(group for group, _ in workloads)],
        [("", rows)],
        kind="heatmap",
    )


def history(series: Series, anchors: dict[str, str]) -> Table | None:
    """Every cell as a sparkline of its medians; None where there is one run only."""
    if len(series.runs) < 2:
        return None

    def row(facts: Facts) -> list[Td]:
        past = [one for _, one in series.history(facts.cell.id)]
        first, before = past[0].cell.median_s, past[-2].cell.median_s if len(past) > 1 else None
        now = facts.cell.median_s
        change = None if before is None else now / before
        return [
            tables.text(facts.cell.label, href=anchors[facts.cell.id]),
            tables.text(charts.sparkline([one.cell.median_s for one in past])),
            tables.count(len(past)),
            tables.seconds(first),
            tables.seconds(now),
            Td(numbers.percent(now / first), now / first),
            Td(numbers.percent(change), change),
        ]

    return Table(
        f"history-{series.number}",
        "Median by run, oldest to newest; each line has its own scale. The cells below have the axes, the "
        "quartiles and the commits.",
        ["cell", "medians", "runs", "oldest", "newest", "since oldest", "since previous"],
        grouped(series.newest, row),
        sortable=True,
    )


def wire(series: Series) -> Table:
    def rows(cells: Sequence[Facts]) -> list[list[Td]]:
        most = max((facts.bytes or 0 for facts in cells), default=0) or 1
        return [
            [
                tables.text(facts.cell.label),
                tables.text(
                    charts.stacked(
                        [
                            charts.Part("out", facts.bytes_out or 0, f"out {numbers.size(facts.bytes_out)}"),
                            charts.Part("in", facts.bytes_in or 0, f"in {numbers.size(facts.bytes_in)}"),
                        ],
                        most,
                    )
                ),
                tables.size(facts.bytes_out),
                tables.size(facts.bytes_in),
                tables.count(facts.round_trips),
                tables.size(facts.peer_bytes),
            ]
            for facts in cells
        ]

    return Table(
        f"wire-{series.number}",
        "Bytes of one request as the client's sockets counted them (a microbenchmark's request is a round "
        "of all its ops). Round trips of the peers are not known. Each workload has its own scale.",
        ["cell", "out and in", "out", "in", "round trips", "server to server"],
        [(group, rows(cells)) for group, cells in by_workload(series.newest)],
        sortable=True,
    )


def tokens(series: Series) -> Table | None:
    """First-token and per-token latency; None where nothing generates."""

    def row(facts: Facts) -> list[Td] | None:
        marks = facts.tokens
        if marks is None:
            return None
        return [
            tables.text(facts.cell.label),
            tables.milliseconds(marks.ttft_ms),
            tables.milliseconds(marks.tpot_ms),
            tables.count(marks.tokens),
            tables.text(marks.observed_at),
        ]

    groups = grouped(series.newest, row)
    if not groups:
        return None
    return Table(
        f"tokens-{series.number}",
        "Time to the first token (TTFT) and mean time per later token (TPOT). Marks seen on the server "
        "leave out the way back, so compare like with like.",
        ["cell", "TTFT", "TPOT", "tokens", "seen on"],
        groups,
        sortable=True,
    )


def phases(series: Series) -> Table:
    """Where the time goes: a stacked bar and its figures for each cell."""

    def rows(cells: Sequence[Facts]) -> list[list[Td]]:
        most = max(max(facts.cell.median_s * 1e3, sum(facts.phases_ms.values())) for facts in cells)
        return [_phase_row(facts, most) for facts in cells]

    return Table(
        f"phases-{series.number}",
        "Phases of a request, medians over rounds. The line marks the median of the whole request.",
        ["cell", "phases", *PHASES, "other", "overlap", "median"],
        [(group, rows(cells)) for group, cells in by_workload(series.newest)],
        sortable=True,
    )


def _phase_row(facts: Facts, most: float) -> list[Td]:
    total = facts.cell.median_s * 1e3
    known = sum(facts.phases_ms.values())
    other, overlap = max(0.0, total - known), max(0.0, known - total)
    told = numbers.milliseconds
    parts = [
        charts.Part(name, facts.phases_ms[name], f"{name} {told(facts.phases_ms[name])}")
        for name in PHASES
        if name in facts.phases_ms
    ]
    parts.append(charts.Part("other", other, f"other {told(other)}"))
    return [
        tables.text(facts.cell.label),
        tables.text(charts.stacked(parts, most, mark=total)),
        *(tables.applicable(facts.phases_ms, name) for name in PHASES),
        tables.milliseconds(other),
        tables.milliseconds(overlap),
        tables.milliseconds(total),
    ]


def ablations(series: Series) -> Table | None:
    """Rows with features switched off over the full row; None where the run has none."""
    groups = []
    for group, cells in by_workload(series.newest):
        full = next((facts for facts in cells if facts.cell.baseline == FULL and not facts.ablated), None)
        rows = [
            _against(facts, full, "without " + _lost(facts, full))
            for facts in cells
            if facts.ablated and full
        ]
        if rows:
            groups.append((group, rows))
    if not groups:
        return None
    return Table(
        f"ablation-{series.number}",
        "genie_full with features switched off, over genie_full with all of them: above 1, what is off buys "
        "time or bytes. A feature that needs another is off with it.",
        ["row", *_COMPARED],
        groups,
        sortable=True,
    )


def _lost(facts: Facts, full: Facts) -> str:
    """What is off: what was asked, and what needs it."""
    return ", ".join(dict.fromkeys([*facts.ablated, *(f for f in full.features if f not in facts.features)]))


def held_against(series: Series) -> Table | None:
    """The other Genie baselines over genie_full; None where genie_full did not run."""
    groups = []
    for group, cells in by_workload(series.newest):
        named = {facts.cell.label: facts for facts in cells}
        full = named.get(FULL)
        rows = [
            _against(named[name], full, what) for name, what in HELD_AGAINST.items() if name in named and full
        ]
        if rows:
            groups.append((group, rows))
    if not groups:
        return None
    return Table(
        f"semantics-{series.number}",
        "Other baselines over genie_full: above 1, genie_full is faster or sends less. A win counts at equal "
        "devices only.",
        ["row", *_COMPARED],
        groups,
        sortable=True,
    )


_COMPARED = (
    "what differs", "time", "time over full", "bytes", "bytes over full", "round trips / full",
    "devices / full",
)  # fmt: skip


def _against(facts: Facts, full: Facts, what: str) -> list[Td]:
    ratio = case_ratio(facts, full)
    more = facts.bytes / full.bytes if facts.bytes is not None and full.bytes else None
    return [
        tables.text(facts.cell.label),
        tables.text(what),
        tables.text(charts.around_one(ratio, most=4.0) if ratio else ""),
        tables.ratio(ratio),
        tables.text(charts.around_one(more, most=100.0) if more else ""),
        Td(numbers.times(more), more),
        _both(facts.round_trips, full.round_trips),
        _both(facts.devices, full.devices),
    ]


def _both(one: int | None, other: int | None) -> Td:
    return Td(f"{numbers.count(one)} / {numbers.count(other)}", one)


def cases(series: Series) -> list[Table]:
    """One table per workload that has cases: local time, and each row's ratio to it."""
    made: list[Table] = []
    for group, cells in by_workload(series.newest):
        if all(set(facts.cell.cases) == {""} for facts in cells):
            continue
        local = next((facts for facts in cells if facts.cell.label == LOCAL), None)
        names = list(dict.fromkeys(name for facts in cells for name in facts.cell.cases if name))
        others = [facts for facts in cells if facts is not local]
        rows = [_case_row(name, local, others) for name in names]
        made.append(
            Table(
                f"cases-{series.number}-{len(made) + 1}",
                f"{group}: median of local_pytorch by op and size, and the other rows over it.",
                ["op", "size", LOCAL, *(facts.cell.label for facts in others)],
                [("", rows)],
                sortable=True,
                kind="heatmap",
            )
        )
    return made


def _case_row(name: str, local: Facts | None, others: Sequence[Facts]) -> list[Td]:
    op, _, size = name.partition("/")
    base = local.cell.cases.get(name) if local else None

    def ratio(facts: Facts) -> Td:
        seconds = facts.cell.cases.get(name)
        value = seconds / base if seconds is not None and base else None
        return tables.ratio(value, hint=f"median {numbers.seconds(seconds)}")

    number = float(size) if size.isdecimal() else None
    return [tables.text(op), Td(size, number), tables.seconds(base), *(ratio(facts) for facts in others)]


def links(series: Series, anchors: dict[str, str]) -> Table | None:
    """The link benchmarks beside a raw socket; None where the run has none."""
    rows = []
    for facts in series.newest.facts.values():
        link = facts.link
        if link is None:
            continue
        rate = [None if (value := link[key]) is None else f"{value / 1e9:.2f} GB/s" for key in _RATES]
        rows.append(
            [
                tables.text(facts.link_case or facts.cell.name, href=anchors[facts.cell.id]),
                tables.seconds(facts.cell.median_s),
                tables.seconds(link["raw_median_s"]),
                tables.ratio(link["time_ratio"]),
                *(Td(one or numbers.DASH) for one in rate),
            ]
        )
    if not rows:
        return None
    return Table(
        f"links-{series.number}",
        "One request through a connection of Genie, in turns with a raw socket that moves as many bytes.",
        ["link", "genie", "raw socket", "time over raw", "genie's rate", "raw rate"],
        [("", rows)],
    )


_RATES = ("bytes_per_s", "raw_bytes_per_s")


def costs(series: Series) -> Table:
    """One-off costs, and CPU time per request."""

    def row(facts: Facts) -> list[Td]:
        return [
            tables.text(facts.cell.label),
            *(tables.applicable(facts.setup_ms, name) for name in SETUP),
            tables.seconds(facts.client_cpu_s),
            tables.seconds(facts.server_cpu_s) if facts.server_cpu_s else Td(numbers.DASH, hint="no server"),
            tables.seconds(facts.cell.median_s),
        ]

    return Table(
        f"costs-{series.number}",
        "One-off costs before the first timed request, and CPU time of all threads per request.",
        ["cell", *SETUP, "CPU client", "CPU server", "median"],
        grouped(series.newest, row),
        sortable=True,
    )


def grouped(run: Run, row: Callable[[Facts], list[Td] | None]) -> list[tuple[str, list[list[Td]]]]:
    """A table's groups: one for each workload that has rows."""
    groups = [(group, [one for facts in cells if (one := row(facts))]) for group, cells in by_workload(run)]
    return [(group, rows) for group, rows in groups if rows]


def _row(facts: Facts) -> tuple[int, tuple[str, ...]]:
    baseline = facts.cell.baseline
    order = ROWS.index(baseline) if baseline in ROWS else len(ROWS)
    return order, (baseline, *facts.ablated)


def facts_note(cells: Sequence[Facts]) -> Markup:
    """ "35 of 35 cells verified", marked up so that a failure stands out."""
    good = sum(facts.verified for facts in cells)
    kind = "good" if good == len(cells) else "bad"
    return Markup('<span class="{}">{} of {} cells verified</span>').format(kind, good, len(cells))
