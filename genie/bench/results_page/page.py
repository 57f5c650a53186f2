"""From result files to Markdown: one section for each, with the same tables."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from statistics import mean
from typing import Any

from genie.bench.ceiling import ceiling_line
from genie.bench.floors import Floor, floor_of, steps_of
from genie.bench.limits import limits_of
from genie.bench.report import numbers
from genie.bench.report.facts import Facts, case_ratio, read_facts
from genie.bench.report.references import COMPILED, gpu_states
from genie.bench.report.sections import LOCAL, by_workload
from genie.bench.report.series import Run
from genie.bench.results import Result
from genie.bench.results_page.losses import FULL, RIVALS, Loss, losses, missing

#: of the server's execution engines, from the receipts: programs run as CUDA graphs and by compiled code,
#: those that an engine failed on, rewrites, and what was run before it was asked for, and in vain
ENGINE_COUNTERS = ("engine_graph", "engine_compiled", "engine_failed", "rewritten", "ahead", "ahead_missed")
HOW_TO_READ = """\
Each figure is from the result file that its section names; none was written by hand.

- **median**, **IQR**: of the timed rounds of one request, from inputs in pageable memory of the client to a
  result that its CPU can read. Every timed result was verified.
- **/ local**, **/ compiled**: over `local_pytorch` (eager) and over `local_compiled` (static cache,
  `torch.compile`, CUDA graphs; a reference, none of the seven baselines) of the same run. Below 1 is faster.
  Of the microbenchmark: the median over its ops.
- **of the limit**: the least time that the model's operations and bytes take at the device's rate and
  bandwidth, over the median. *m*: mostly bound by memory, *c*: by computing. With several devices, of all
  those that the row used together. Copies from and to the host, and all else, count as lost.
- **out**, **in**, **trips**: bytes of one request at the client's sockets, and round trips (the peers' are
  not known).
- **memory**: the largest peak of torch's allocator on any GPU that worked on it; **energy**: of the whole
  GPUs, mean per request; n/a where they were not asked (the peers) or there is none.
"""


def render(results: Sequence[Result], title: str) -> str:
    command = shlex.join(["genie", "results", *(result.path.name for result in results), "-o", "PAGE.md"])
    parts = [f"# {title}", f"Made by `{command}`.", HOW_TO_READ.rstrip()]
    for result in results:
        run = Run(result, {id_: read_facts(cell, result.path) for id_, cell in result.cells.items()})
        parts += _section(run)
    return "\n\n".join(parts) + "\n"


def _section(run: Run) -> list[str]:
    workloads = by_workload(run)
    parts = [f"## {run.result.path.name}", _about(run), "### Where Genie loses", _losses(workloads)]
    for group, cells in workloads:
        parts += [f"### {group}", _table(run, cells)]
        if any(facts.tokens for facts in cells):
            parts.append(_tokens(run, cells))
    engines = _engines(workloads)
    if engines:
        parts += [
            "### Engines",
            "What the servers count in the receipts of the last request, summed.",
            engines,
        ]
    return parts


def _about(run: Run) -> str:
    result, cells = run.result, run.cells
    good = sum(facts.verified for facts in cells)
    device = _most_devices(cells)
    lines = [
        f"commit {run.commit}, {numbers.moment(result.when)}, "
        f"profile {', '.join(sorted({facts.cell.profile for facts in cells}))}; "
        f"{good} of {len(cells)} cells verified",
        f"devices: {device}",
    ]
    client = cells[0].fingerprint["client"] if cells else {}
    if client:
        libraries = client.get("libraries") or {}
        told = ", ".join(
            f"{name} {libraries[name]}" for name in ("torch", "transformers") if libraries.get(name)
        )
        lines.append(f"client: {client.get('cores')} cores of {client.get('cpu_model')}, {told}")
    lines += gpu_states(run)
    for dtype in dict.fromkeys(str(facts.cell.info["model"]["dtype"]) for facts in cells):
        limits = limits_of(result.limits, _model(cells[0]), dtype) if cells else None
        lines.append(
            f"limits of a device in {dtype}: not known, so no fraction of them is given"
            if limits is None
            else f"limits of a device in {dtype}: {limits.rate / 1e12:.3g} TFLOP/s, "
            f"{limits.bandwidth / 1e9:.3g} GB/s; {limits.source}"
        )
    if result.ceiling is not None:
        lines.append(ceiling_line(dict(result.ceiling)))
    return "\n".join(f"- {line}" for line in lines)


def _most_devices(cells: Sequence[Facts]) -> str:
    most: Sequence[Any] = max((facts.fingerprint["devices"] for facts in cells), key=len, default=[])
    names = [str(device.get("model")) for device in most]
    return (
        ", ".join(f"{names.count(name)} {numbers.TIMES} {name}" for name in dict.fromkeys(names)) or "unknown"
    )


def _losses(workloads: Sequence[tuple[str, Sequence[Facts]]]) -> str:
    found = losses(workloads)
    lines = [f"- `{one.group}`: {numbers.times(one.ratio)} of `{one.rival}` ({_both(one)})" for one in found]
    if not any(facts.cell.label == FULL for _, cells in workloads for facts in cells):
        return f"- `{FULL}` is not in this run."
    if not lines:
        labels = {facts.cell.label for _, cells in workloads for facts in cells}
        rivals = ", ".join(f"`{name}`" for name in RIVALS if name in labels)
        lines = [f"- in no cell of this run is `{FULL}` slower than {rivals or 'another row'}."]
    lines += [
        f"- `{group}`: not compared with what this run lacks: {names}." for group, names in missing(workloads)
    ]
    return "\n".join(lines)


def _both(loss: Loss) -> str:
    full, other = (
        f"{numbers.seconds(facts.cell.median_s)} on {facts.devices} device{'' if facts.devices == 1 else 's'}"
        for facts in (loss.full, loss.other)
    )
    return f"{full}, against {other}"


def _table(run: Run, cells: Sequence[Facts]) -> str:
    reference = {facts.cell.label: facts for facts in cells}
    rows = []
    for facts in cells:
        gpus = facts.gpus
        rows.append(
            [
                f"`{facts.cell.label}`" + ("" if facts.verified else " NOT VERIFIED"),
                numbers.seconds(facts.cell.median_s),
                numbers.seconds(facts.q3_s - facts.q1_s) if facts.q3_s > facts.q1_s else "0",
                _over(facts, reference.get(LOCAL)),
                _over(facts, reference.get(COMPILED)),
                _of_limit(_floor(run, facts), facts.cell.median_s),
                numbers.size(facts.bytes_out),
                numbers.size(facts.bytes_in),
                numbers.count(facts.round_trips),
                numbers.count(facts.devices),
                numbers.size(gpus.peak_bytes if gpus else None),
                numbers.joules(gpus.energy_j if gpus else None),
            ]
        )
    head = ["row", "median", "IQR", "/ local", "/ compiled", "of the limit", "out", "in", "trips", "devices",
            "memory", "energy"]  # fmt: skip
    return _markdown(head, rows)


def _tokens(run: Run, cells: Sequence[Facts]) -> str:
    """Of the decode: the first token, and each later one."""
    marks = {facts.cell.label: facts.tokens for facts in cells}
    rows = []
    for facts in cells:
        tokens = facts.tokens
        if tokens is None:
            continue
        each = tokens.tpot_ms
        floor = _floor(run, facts, later_tokens=True)
        rows.append(
            [
                f"`{facts.cell.label}`",
                numbers.milliseconds(tokens.ttft_ms),
                numbers.milliseconds(each),
                *(_quotient(each, other.tpot_ms if (other := marks.get(name)) else None)
                  for name in (LOCAL, COMPILED)),
                _of_limit(floor, None if each is None else each / 1e3),
                numbers.count(tokens.tokens),
                tokens.observed_at,
            ]
        )  # fmt: skip
    head = ["row", "TTFT", "TPOT", "TPOT / local", "TPOT / compiled", "of the limit", "tokens", "seen on"]
    return _markdown(head, rows)


def _engines(workloads: Sequence[tuple[str, Sequence[Facts]]]) -> str:
    rows = [
        [f"`{group}`", f"`{facts.cell.label}`",
         *(numbers.count(facts.counters.get(name, 0)) for name in ENGINE_COUNTERS)]
        for group, cells in workloads
        for facts in cells
        if any(facts.counters.get(name) for name in ENGINE_COUNTERS)
    ]  # fmt: skip
    return _markdown(["workload", "row", *(f"`{name}`" for name in ENGINE_COUNTERS)], rows) if rows else ""


def _floor(run: Run, facts: Facts, later_tokens: bool = False) -> Floor | None:
    """Of a request, or of the mean later token of a decode, on the devices of the row."""
    steps = steps_of(facts.cell.info)
    limits = limits_of(run.result.limits, _model(facts), str(facts.cell.info["model"]["dtype"]))
    if steps is None or limits is None:
        return None
    if later_tokens:
        each = [floor_of((step,), limits) for step in steps[1:]]
        found = Floor(mean(floor.seconds for floor in each), each[-1].bound) if each else None
    else:
        found = floor_of(steps, limits)
    return found and Floor(found.seconds / max(1, facts.devices or 1), found.bound)


def _model(facts: Facts) -> str:
    devices = facts.fingerprint["devices"]
    return str(devices[0].get("model")) if devices else ""


def _of_limit(floor: Floor | None, seconds: float | None) -> str:
    if floor is None or not seconds:
        return numbers.ABSENT
    return f"{100 * floor.seconds / seconds:.3g} % {floor.bound[0]}"


def _over(facts: Facts, other: Facts | None) -> str:
    return numbers.ABSENT if other is None else numbers.times(case_ratio(facts, other))


def _quotient(value: float | None, other: float | None) -> str:
    return numbers.ABSENT if value is None or not other else numbers.times(value / other)


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The first column to the left, the others to the right."""
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, rule, *rows])
