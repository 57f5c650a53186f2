"""What the cost model predicted for the microbenchmark's cases, beside what the server measured.

A case of the stored cell gets ``remote_ms`` (median over rounds of the receipts' execution time),
``measured_ms`` (the same by the clock that the device is calibrated by) and, where the device of the
server is calibrated, ``predicted_ms`` and ``held_out``. The cell gets
``cost_model: {mape, spearman, clock}`` over its held-out cases, None where nothing is predicted.
``clock`` is "cpu" (CPU-seconds of the server's execution) on a CPU device of one core, else "wall".
"""

from __future__ import annotations

from statistics import median
from typing import Any

from genie.bench.record import CellRecord
from genie.cost import store
from genie.cost.judge import Row, judgement
from genie.cost.measure import in_cpu_seconds
from genie.device_facts import DeviceFacts


def add_predictions(info: dict[str, Any], record: CellRecord, facts: DeviceFacts) -> None:
    """Changes ``info``, the `extra_info` of a cell with cases that ran on the device of ``facts``."""
    predicted = _stored(facts, info["model"]["dtype"])
    by_cpu = in_cpu_seconds(facts)
    rows = []
    for name, case in info["cases"].items():
        replies = [t.reply for t in record.timed if t.case == name]
        case["remote_ms"] = median(r.phases_ms.get("remote", 0.0) for r in replies)
        case["measured_ms"] = median(r.server_cpu_s * 1e3 for r in replies) if by_cpu else case["remote_ms"]
        known = predicted.get(name)
        case["predicted_ms"] = None if known is None else known.predicted_s * 1e3
        case["held_out"] = None if known is None else known.held_out
        if known is not None and known.held_out and case["measured_ms"] > 0:
            rows.append(Row(name, known.family, case["measured_ms"] * 1e-3, known.predicted_s, True))
    found = judgement(rows) if rows else None
    info["cost_model"] = (
        None
        if found is None
        else {"mape": found.mape, "spearman": found.spearman, "clock": "cpu" if by_cpu else "wall"}
    )


def _stored(facts: DeviceFacts, dtype: str) -> dict[str, Row]:
    """The calibration's predictions by case; none of one that a server's memory limit cut short."""
    model = store.load(store.key_of(facts))
    if model is None:
        return {}
    found = {}
    for kind in ("held_out", "fitted"):
        for label, family, measured_s, predicted_s in (
            model.measured.get(dtype, {}).get(kind, {}).get("rows", ())
        ):
            found[label] = Row(label, family, measured_s, predicted_s, kind == "held_out")
    return found
