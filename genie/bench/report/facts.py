"""A cell's stored figures with their types checked, so that no section has to doubt them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from genie.bench.results import CellResult
from genie.errors import ResultError

#: workloads of the benchmarks of the link and of the client's cost, which are no cells of the matrix
BESIDE = ("link", "client_cost")
#: in the order in which a request meets them
PHASES = ("capture", "plan", "send", "remote", "fetch")
#: of a link benchmark, beside a raw socket
LINK_FIGURES = ("raw_median_s", "time_ratio", "bytes_per_s", "raw_bytes_per_s")
SETUP = ("load", "upload", "compile", "capture", "warm")


@dataclass(frozen=True)
class Tokens:
    """Latencies of a generation in milliseconds; ``tpot_ms`` is None where one token was made."""

    ttft_ms: float
    tpot_ms: float | None
    tokens: int
    observed_at: str


@dataclass(frozen=True)
class Planned:
    """How the windows of a request were scheduled, and what they were predicted and measured to take."""

    policies: tuple[tuple[str, int], ...]  # what was followed, and in how many windows
    why: str
    windows: int
    predicted_ms: float | None
    measured_ms: float


@dataclass(frozen=True)
class Prediction:
    """Execution of one case of the microbenchmark; ``held_out``: the cost model was not fitted to it."""

    case: str
    predicted_ms: float
    measured_ms: float
    held_out: bool


@dataclass(frozen=True)
class Gpus:
    """What a request cost the GPUs that it ran on: the largest peak in bytes, the energy of all in joules,
    the busiest one's utilisation in percent, and what slowed any of them down."""

    peak_bytes: int | None
    energy_j: float | None
    utilization: float | None
    sm_mhz: int | None
    slowed_by: tuple[str, ...]


@dataclass(frozen=True)
class Facts:
    """What the report reads of a `CellResult`. Times per request; None where a figure does not apply.

    ``cases`` are medians in seconds by case, one case ``""`` for all but the microbenchmark.
    """

    cell: CellResult
    ratio: float | None
    q1_s: float
    q3_s: float
    min_s: float
    max_s: float
    verified: bool
    verified_by: str
    max_abs_err: float | None
    bytes_out: int | None
    bytes_in: int | None
    round_trips: int | None
    peer_bytes: int | None
    phases_ms: Mapping[str, float]
    setup_ms: Mapping[str, float]
    tokens: Tokens | None
    client_cpu_s: float | None
    server_cpu_s: float | None
    devices: int | None
    features: tuple[str, ...]
    ablated: tuple[str, ...]
    model: str
    weights: str
    weights_sha256: str
    device_name: str
    ops: int | None
    link: Mapping[str, float | None] | None
    link_case: str
    fingerprint: Mapping[str, Any]
    plan: Planned | None
    predictions: tuple[Prediction, ...] = ()
    cost_mape: float | None = None  # percent, of the held-out cases
    cost_spearman: float | None = None
    gpus: Gpus | None = None
    #: of the last request, summed over its receipts
    counters: Mapping[str, int] = field(default_factory=dict)
    cost_clock: str = ""  # "cpu": measured times are CPU-seconds of the server; "wall"

    @property
    def is_beside(self) -> bool:
        """Of the link, or of what the client costs: no cell of the matrix."""
        return self.cell.workload in BESIDE

    @property
    def bytes(self) -> int | None:
        """Both directions of the client's sockets."""
        return None if self.bytes_out is None or self.bytes_in is None else self.bytes_out + self.bytes_in


def read_facts(cell: CellResult, path: Path) -> Facts:
    """Raises ResultError for figures that are missing, of another type, or no numbers."""
    info = cell.info
    try:
        verified, wire, weights = info["verified"], info["wire"], info["weights"]
        cpu, receipt, llm = info.get("cpu_s") or {}, info.get("receipt") or {}, info.get("llm")
        for value in (cell.median_s, *cell.samples_s, *cell.cases.values()):
            _positive(value)
        fingerprint, link = info["fingerprint"], info.get("link")
        if not isinstance(fingerprint["client"], Mapping) or not isinstance(fingerprint["devices"], list):
            raise TypeError("a fingerprint without a client and a list of devices")
        return Facts(
            cell=cell,
            ratio=None if info.get("ratio_to_local") is None else _positive(info["ratio_to_local"]),
            q1_s=_positive(cell.stats["q1"]),
            q3_s=_positive(cell.stats["q3"]),
            min_s=_positive(cell.stats["min"]),
            max_s=_positive(cell.stats["max"]),
            verified=verified["ok"] is True,
            verified_by=str(verified.get("kind") or "nothing"),
            max_abs_err=_number(verified.get("max_abs_err")),
            bytes_out=_whole(wire.get("bytes_out")),
            bytes_in=_whole(wire.get("bytes_in")),
            round_trips=_whole(wire.get("round_trips")),
            peer_bytes=_whole(wire.get("peer_bytes")),
            phases_ms=_numbers(info.get("phases_ms")),
            setup_ms=_numbers(info.get("setup_ms")),
            tokens=None
            if llm is None
            else Tokens(
                float(llm["ttft_ms"]),
                _number(llm.get("tpot_ms")),
                int(llm["tokens"]),
                str(llm.get("observed_at") or "client"),
            ),
            client_cpu_s=_number(cpu.get("client")),
            server_cpu_s=_number(cpu.get("server")),
            devices=_whole(info.get("devices")),
            features=tuple(map(str, info.get("features") or ())),
            ablated=tuple(map(str, info.get("ablated") or ())),
            model=str((info.get("model") or {}).get("name") or ""),
            weights=str(weights.get("source") or "none"),
            weights_sha256=str(weights.get("sha256") or ""),
            device_name=str(receipt.get("device") or ""),
            ops=_whole(receipt.get("ops")),
            link=None if link is None else {name: _number(link.get(name)) for name in LINK_FIGURES},
            link_case="" if link is None else str(link.get("case") or ""),
            fingerprint=fingerprint,
            plan=_plan(info.get("plan")),
            predictions=_predictions(info.get("cases")),
            cost_mape=_number((info.get("cost_model") or {}).get("mape")),
            cost_spearman=_number((info.get("cost_model") or {}).get("spearman")),
            gpus=_gpus(info.get("gpu")),
            counters=_counters(info.get("receipts")),
            cost_clock=str((info.get("cost_model") or {}).get("clock") or ""),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ResultError(
            f"{path}: {cell.name} cannot be read ({type(error).__name__}: {error}): the file is damaged; "
            "run the suite again"
        ) from None


def _predictions(cases: Any) -> tuple[Prediction, ...]:
    found = []
    for name, case in (cases or {}).items():
        time = case.get("measured_ms") or case.get("remote_ms")
        if case.get("predicted_ms") is not None and time:
            predicted, measured = _positive(case["predicted_ms"]), _positive(time)
            found.append(Prediction(str(name), predicted, measured, case.get("held_out") is True))
    return tuple(found)


def _gpus(stored: Any) -> Gpus | None:
    if not stored:
        return None
    peaks = [_whole(gpu.get("peak_allocated")) for gpu in stored]
    energies = [_number(gpu.get("energy_mj")) for gpu in stored]
    busy = [value for gpu in stored if (value := _number(gpu.get("utilization"))) is not None]
    clocks = [value for gpu in stored if (value := _whole(gpu.get("sm_mhz"))) is not None]
    return Gpus(
        max((peak for peak in peaks if peak is not None), default=None),
        None if None in energies else sum(value or 0.0 for value in energies) / 1e3,
        max(busy, default=None),
        min(clocks, default=None),
        tuple(dict.fromkeys(str(reason) for gpu in stored for reason in gpu.get("slowed_by") or ())),
    )


def _counters(receipts: Any) -> dict[str, int]:
    found: dict[str, int] = {}
    for receipt in receipts or ():
        for name, value in (receipt.get("counters") or {}).items():
            found[str(name)] = found.get(str(name), 0) + int(value)
    return found


def _plan(stored: Any) -> Planned | None:
    if stored is None:
        return None
    followed = [
        (" ".join(filter(None, (str(p["policy"]), str(p["label"])))), int(p["windows"]))
        for p in stored["policies"]
    ]
    return Planned(
        tuple(followed),
        "; ".join(dict.fromkeys(str(p["why"]) for p in stored["policies"])),
        int(stored["windows"]),
        _number(stored["predicted_ms"]),
        _positive(stored["measured_ms"]),
    )


def case_ratio(one: Facts, other: Facts) -> float | None:
    """Time of ``one`` over that of ``other``: the median over common cases, as the suite's own ratio is."""
    ratios = [
        seconds / other.cell.cases[case]
        for case, seconds in one.cell.cases.items()
        if case in other.cell.cases
    ]
    return median(ratios) if ratios else None


def _number(value: Any) -> float | None:
    if value is None:
        return None
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"{value} where a number belongs")
    return number


def _positive(value: Any) -> float:
    number = _number(value)
    if number is None or number <= 0:
        raise ValueError(f"{value} where a time or a ratio belongs")
    return number


def _whole(value: Any) -> int | None:
    return None if value is None else int(value)


def _numbers(value: Any) -> dict[str, float]:
    return {str(name): _number(number) or 0.0 for name, number in (value or {}).items()}
