"""From the timed requests of a cell to the stable keys of its ``extra_info`` (schema version 3)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median, median_low
from typing import Any

from genie.baselines.protocol import Metering, PlanSummary, Receipt, Reply, Setup
from genie.bench.kernel_bytes import SocketBytes
from genie.bench.schema import SCHEMA_VERSION
from genie.gpu_meter import GpuUse
from genie.workloads.protocol import Response, Verification


@dataclass
class Timed:
    """One request on the clock. Its outputs are dropped once they are verified.

    ``seconds`` is wall clock around ``Baseline.run`` alone; ``client_cpu_s`` is CPU time of this
    whole process, all its threads, over the same span.
    """

    round: int
    index: int
    case: str
    seconds: float
    client_cpu_s: float
    reply: Reply
    output_bytes: int
    verdict: Verification | None = None
    #: what this process's sockets carried meanwhile, read by the harness; None where others hold them
    kernel: SocketBytes | None = None
    gpu: Metering = field(default_factory=Metering)

    def drop_outputs(self) -> None:
        """Let go of the tensors, keep the token marks."""
        self.reply.response = Response(outputs={}, token_s=self.reply.response.token_s)


@dataclass
class CellRecord:
    """Everything known about a measured cell, before it is judged and written down."""

    baseline: str
    workload: str
    profile: str
    params: dict[str, object]
    features: tuple[str, ...]
    client_cores: tuple[int, ...]
    warmups: int
    ablated: tuple[str, ...] = ()
    fingerprint: dict[str, Any] = field(default_factory=dict)
    setup: Setup | None = None
    setup_ms: dict[str, float] = field(default_factory=dict)
    timed: list[Timed] = field(default_factory=list)

    def rounds(self) -> list[list[Timed]]:
        """Timed requests by round: one each, but for the microbenchmark's one per case."""
        numbers = sorted({timed.round for timed in self.timed})
        return [[timed for timed in self.timed if timed.round == number] for number in numbers]

    def case_medians(self) -> dict[str, float]:
        cases = dict.fromkeys(timed.case for timed in self.timed)
        return {case: median(t.seconds for t in self.timed if t.case == case) for case in cases}

    def round_seconds(self) -> list[float]:
        return [sum(timed.seconds for timed in one) for one in self.rounds()]

    def identity(self) -> dict[str, Any]:
        """Keys that are known before anything has run."""
        return {
            "schema_version": SCHEMA_VERSION,
            "baseline": self.baseline,
            "workload": self.workload,
            "profile": self.profile,
            "params": dict(self.params),
            "features": list(self.features),
            "ablated": list(self.ablated),
            "fingerprint": self.fingerprint,
            "verified": {"ok": False, "kind": None, "max_abs_err": None},
        }

    def extra_info(self) -> dict[str, Any]:
        """All keys. Per-request figures are medians over rounds; a round of cases counts as one request."""
        setup = self.setup
        if setup is None:
            raise ValueError("a cell without setup has nothing to record")
        info = self.identity()
        info |= {
            "model": {
                "name": setup.model.name,
                "params": setup.model.params,
                "dtype": setup.model.dtype,
            },
            "setup_ms": {name: round(value, 3) for name, value in self.setup_ms.items()},
            "verified": self._verified(),
            "wire": self._wire(),
            "receipt": self._receipt(),
            "receipts": [_receipt_dict(receipt) for receipt in self._last_receipts()],
            "phases_ms": self._phases(),
            "llm": self._llm(),
            "weights": {"source": setup.model.weights_source, "sha256": setup.model.weights_sha256},
            "devices": max([setup.devices, *(len(_pids(t.reply.plans)) for t in self.timed)]),
            "plan": self._plan(),
            "cpu_s": {
                "client": self._median(lambda timed: timed.client_cpu_s),
                "server": self._median(lambda timed: timed.reply.server_cpu_s),
            },
            **self._gpu(),
            "client_cores": list(self.client_cores),
            "rounds": len(self.rounds()),
            "warmup": self.warmups,
            "cases": self._cases(),
        }
        return info

    def _median(self, value: Callable[[Timed], float]) -> float:
        return median(sum(value(timed) for timed in one) for one in self.rounds())

    def _median_int(self, value: Callable[[Timed], int | None]) -> int | None:
        """Median of a counter, always a value that was really counted; None where it is not known."""
        sums = []
        for one in self.rounds():
            values = [value(timed) for timed in one]
            if any(counted is None for counted in values):
                return None
            sums.append(sum(counted for counted in values if counted is not None))
        return median_low(sums)

    def _verified(self) -> dict[str, Any]:
        verdicts = [timed.verdict for timed in self.timed]
        errors = [v.max_abs_err for v in verdicts if v is not None and v.max_abs_err is not None]
        return {
            "ok": all(verdict is not None and verdict.ok for verdict in verdicts),
            "kind": next((v.kind for v in verdicts if v is not None), None),
            "max_abs_err": max(errors) if errors else None,
        }

    def _wire(self) -> dict[str, Any]:
        return {
            "bytes_out": self._median_int(lambda timed: timed.reply.wire.bytes_out),
            "bytes_in": self._median_int(lambda timed: timed.reply.wire.bytes_in),
            "round_trips": self._median_int(lambda timed: timed.reply.wire.round_trips),
            "peer_bytes": self._median_int(lambda timed: timed.reply.wire.peer_bytes),
        }

    def _last_receipts(self) -> list[Receipt]:
        return [receipt for timed in self.rounds()[-1] for receipt in timed.reply.receipts]

    def _receipt(self) -> dict[str, Any] | None:
        """The last round in one line: its busiest process, with ops and programs summed over all."""
        receipts = self._last_receipts()
        if not receipts:
            return None
        busiest = max(receipts, key=lambda receipt: receipt.ops or 0)
        return {
            "pid": busiest.pid,
            "device": busiest.device,
            "ops": _sum_known([receipt.ops for receipt in receipts]),
            "programs": _sum_known([receipt.programs for receipt in receipts]),
            "digest": busiest.digest,
        }

    def _phases(self) -> dict[str, float]:
        names = dict.fromkeys(name for timed in self.timed for name in timed.reply.phases_ms)
        return {
            name: median(sum(t.reply.phases_ms.get(name, 0.0) for t in one) for one in self.rounds())
            for name in names
        }

    def _plan(self) -> dict[str, Any] | None:
        """How the last round's windows were scheduled. ``predicted_ms``: all windows of a round together,
        median over rounds, to stand beside the round's time; None without a cost model."""
        rounds = [[plan for timed in one for plan in timed.reply.plans] for one in self.rounds()]
        if not rounds[-1]:
            return None
        sums = [sum(p.predicted_ms or 0.0 for p in plans) for plans in rounds]
        known = all(plan.predicted_ms is not None for plans in rounds for plan in plans)
        followed: dict[tuple[str, str], dict[str, Any]] = {}
        for plan in rounds[-1]:
            row = followed.setdefault(
                (plan.policy, plan.label),
                {
                    "policy": plan.policy,
                    "label": plan.label,
                    "why": plan.why,
                    "servers": len(plan.pids),
                    "windows": 0,
                },
            )
            row["windows"] += 1
        return {
            "predicted_ms": median(sums) if known else None,
            "measured_ms": median(self.round_seconds()) * 1e3,
            "windows": len(rounds[-1]),
            "policies": list(followed.values()),
        }

    def _llm(self) -> dict[str, Any] | None:
        """TTFT is the first token's mark; TPOT the mean gap of the later ones. Medians over rounds."""
        marked = [timed for timed in self.timed if timed.reply.response.token_s]
        if not marked:
            return None
        gaps = [_mean_gap(timed.reply.response.token_s) for timed in marked]
        known = [gap for gap in gaps if gap is not None]
        return {
            "ttft_ms": median(timed.reply.response.token_s[0] for timed in marked) * 1e3,
            "tpot_ms": median(known) * 1e3 if known else None,
            "tokens": len(marked[0].reply.response.token_s),
            "observed_at": marked[0].reply.tokens_observed_at,
        }

    def _gpu(self) -> dict[str, Any]:
        """``gpu``: by GPU, over the timed requests; None where there is none or it was not asked, and
        ``gpu_why`` says so. Peaks are the highest of any request. The driver's energy counter is coarser than
        a short request, so the energy is the mean over all of them; a round of cases counts as one."""
        found: dict[str | None, list[GpuUse]] = {}
        for timed in self.timed:
            for use in timed.gpu.gpus:
                found.setdefault(use.uuid, []).append(use)
        if not found:
            return {"gpu": None, "gpu_why": next((t.gpu.why for t in self.timed if t.gpu.why), "not asked")}
        rounds = len(self.rounds())
        whys = dict.fromkeys(use.why for uses in found.values() for use in uses if use.why)
        return {
            "gpu": [{"uuid": uuid, **_gpu_of(uses, rounds)} for uuid, uses in found.items()],
            "gpu_why": next(iter(whys), None),
        }

    def _cases(self) -> dict[str, dict[str, Any]] | None:
        medians = self.case_medians()
        if set(medians) == {""}:
            return None
        rows = {}
        for case, seconds in medians.items():
            wires = [timed.reply.wire for timed in self.timed if timed.case == case]
            rows[case] = {
                "median_s": seconds,
                "min_s": min(timed.seconds for timed in self.timed if timed.case == case),
                "bytes_out": median_low(wire.bytes_out for wire in wires),
                "bytes_in": median_low(wire.bytes_in for wire in wires),
            }
        return rows


def _pids(plans: Sequence[PlanSummary]) -> set[int]:
    return {pid for plan in plans for pid in plan.pids}


def _gpu_of(uses: Sequence[GpuUse], rounds: int) -> dict[str, Any]:
    last = uses[-1]
    energy = _sum_known([use.energy_mj for use in uses])
    busy = [use.utilization for use in uses if use.utilization is not None]
    slowed = [use.slowed_by for use in uses if use.slowed_by is not None]
    return {
        "peak_allocated": _most([use.peak_allocated for use in uses]),
        "peak_reserved": _most([use.peak_reserved for use in uses]),
        "energy_mj": None if energy is None else energy / rounds,
        "energy_s": sum(use.seconds for use in uses) / rounds,
        "utilization": median(busy) if busy else None,
        "sm_mhz": last.sm_mhz,
        "memory_mhz": last.memory_mhz,
        "power_limit_w": last.power_limit_w,
        "slowed_by": sorted({reason for one in slowed for reason in one}) if slowed else None,
    }


def _most(values: Sequence[int | None]) -> int | None:
    return max((value for value in values if value is not None), default=None)


def _mean_gap(marks: Sequence[float]) -> float | None:
    return (marks[-1] - marks[0]) / (len(marks) - 1) if len(marks) > 1 else None


def _sum_known(values: Sequence[int | None]) -> int | None:
    return None if any(value is None for value in values) else sum(value or 0 for value in values)


def _receipt_dict(receipt: Receipt) -> dict[str, Any]:
    return {
        "pid": receipt.pid,
        "device": receipt.device,
        "ops": receipt.ops,
        "programs": receipt.programs,
        "digest": receipt.digest,
        "counters": dict(receipt.counters),
    }
