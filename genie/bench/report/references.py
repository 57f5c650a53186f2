"""Rows against the compiled local reference, and what requests cost the GPUs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from genie.bench.report import numbers, tables
from genie.bench.report.facts import Facts, case_ratio
from genie.bench.report.sections import by_workload, grouped
from genie.bench.report.series import Run, Series
from genie.bench.report.tables import Table, Td

COMPILED = "local_compiled"
#: what a result tells of a GPU's state, and its unit
STATE = (("sm_mhz", "SM MHz"), ("memory_mhz", "memory MHz"), ("power_limit_w", "W limit"))


def over_compiled(series: Series) -> Table | None:
    """Every row over local_compiled; None where it did not run."""
    groups = []
    for group, cells in by_workload(series.newest):
        reference = next((facts for facts in cells if facts.cell.label == COMPILED), None)
        if reference is not None:
            rows = [_over(facts, reference) for facts in cells if facts is not reference]
            groups.append((f"{group}: {numbers.seconds(reference.cell.median_s)}", rows))
    if not groups:
        return None
    return Table(
        f"compiled-{series.number}",
        "Time of a request over that of local_compiled, the best idiom on the same local device (a static KV "
        "cache, torch.compile, CUDA graphs): a reference row, none of the seven. Below 1 is faster.",
        ["row", "median", "over local_compiled"],
        groups,
        sortable=True,
    )


def _over(facts: Facts, reference: Facts) -> list[Td]:
    return [
        tables.text(facts.cell.label),
        tables.seconds(facts.cell.median_s),
        tables.ratio(case_ratio(facts, reference)),
    ]


def gpus(series: Series) -> Table | None:
    """None where no cell's GPUs were asked."""

    def row(facts: Facts) -> list[Td] | None:
        used = facts.gpus
        if used is None:
            return None
        return [
            tables.text(facts.cell.label),
            tables.size(used.peak_bytes),
            Td(numbers.joules(used.energy_j), used.energy_j),
            Td(numbers.ABSENT if used.utilization is None else f"{used.utilization:.0f} %", used.utilization),
            Td(numbers.ABSENT if used.sm_mhz is None else f"{used.sm_mhz} MHz", used.sm_mhz),
            tables.text(", ".join(used.slowed_by) or numbers.DASH),
        ]

    groups = grouped(series.newest, row)
    if not groups:
        return None
    return Table(
        f"gpu-{series.number}",
        "Per request: peak memory of the process that has the model, energy of the whole GPU (mean over the "
        "rounds: the driver's counter is coarse), its utilisation and clock as the driver samples them. The "
        "peers' processes are not asked.",
        ["cell", "peak memory", "energy", "utilisation", "SM clock", "slowed by"],
        groups,
        sortable=True,
    )


def gpu_states(run: Run) -> list[str]:
    """The host's GPUs as the run's first cell that had one found them, a line each."""
    for facts in run.facts.values():
        listed: Sequence[Mapping[str, Any]] = facts.fingerprint.get("gpus") or ()
        if listed:
            return [_state(gpu) for gpu in listed]
    return []


def _state(gpu: Mapping[str, Any]) -> str:
    told = [f"{gpu[key]:g} {unit}" for key, unit in STATE if gpu.get(key) is not None]
    slowed = gpu.get("slowed_by")
    if slowed is not None:
        told.append(f"slowed by {', '.join(slowed)}" if slowed else "not slowed")
    if gpu.get("why"):
        told.append(f"refused: {gpu['why']}")
    return ", ".join([str(gpu.get("name") or "GPU"), f"driver {gpu.get('driver') or 'unknown'}", *told])
