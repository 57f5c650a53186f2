"""Result files as the suite stores them, with figures that a test chooses: input for the report."""

from __future__ import annotations

import json
import random
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from genie.bench.options import BASELINES
from genie.config import IMPLEMENTED_FEATURES

WORKLOADS = ("llm_decode", "llm_prefill", "vision_cnn", "multimodal_vqa", "microbenchmark")
CASES = tuple(f"{op}/{size}" for op in ("matmul", "conv2d", "softmax", "cat") for size in (64, 512, 1024))
CLIENT = {
    "cpu_model": "Test CPU",
    "cores": 4,
    "machine": "x86_64",
    "python": "3.11",
    "libraries": {"torch": "2"},
}
DEVICE = {"type": "cpu", "model": "Test CPU", "cores": 1, "torch": "2", "driver": None, "max_sm_mhz": None}


def samples(median_s: float, rounds: int = 7, seed: int = 0) -> list[float]:
    """Latencies with a long tail around a median."""
    rng = random.Random(seed)
    drawn = [rng.lognormvariate(0, 0.05) for _ in range(rounds)]
    return [median_s * value / median(drawn) for value in drawn]


def stats(data: list[float]) -> dict[str, Any]:
    q1, middle, q3 = quantiles(data, n=4, method="inclusive") if len(data) > 1 else data * 3
    return {
        "min": min(data),
        "max": max(data),
        "median": middle,
        "q1": q1,
        "q3": q3,
        "rounds": len(data),
        "data": data,
    }


def cell(
    workload: str,
    baseline: str,
    median_s: float = 0.1,
    *,
    ratio: float | None = 1.0,
    ablated: tuple[str, ...] = (),
    rounds: int = 7,
    seed: int = 0,
    client: dict[str, Any] = CLIENT,
    **more: Any,
) -> dict[str, Any]:
    """One benchmark of a result file. ``more`` replaces keys of its ``extra_info``."""
    remote = baseline not in ("local_pytorch", "genie_capture_only")
    micro = workload == "microbenchmark"
    name = f"test_{workload}[{baseline}{''.join('-no_' + feature for feature in ablated)}]"
    info = {
        "schema_version": 2,
        "baseline": baseline,
        "workload": workload,
        "profile": "smoke",
        "params": {},
        "features": [f for f in IMPLEMENTED_FEATURES if baseline == "genie_full" and f not in ablated],
        "ablated": list(ablated),
        "verified": {
            "ok": True,
            "kind": "tokens" if workload == "llm_decode" else "allclose",
            "max_abs_err": None,
        },
        "model": {"name": "tiny", "params": 1000, "dtype": "float32"},
        "setup_ms": {"load": 40.0, "warm": 20.0} | ({"upload": 30.0, "capture": 200.0} if remote else {}),
        "wire": {
            "bytes_out": 14885 * remote,
            "bytes_in": 1470 * remote,
            "round_trips": None if baseline in ("pytorch_rpc", "ray") else 9 * remote,
            "peer_bytes": 0,
        },
        "receipt": {"pid": 7, "device": "cpu:0 Test CPU", "ops": 100, "programs": 9, "digest": "d"}
        if remote
        else None,
        "phases_ms": {"capture": 20.0, "send": 1.0, "remote": 40.0, "fetch": 9.0} if remote else {},
        "llm": {"ttft_ms": 30.0, "tpot_ms": 5.0, "tokens": 8, "observed_at": "client"}
        if workload == "llm_decode"
        else None,
        "weights": {"source": "seeded", "sha256": "ab" * 32},
        "devices": 1,
        "cpu_s": {"client": 0.04, "server": 0.03 * remote},
        "rounds": rounds,
        "cases": {case: {"median_s": median_s / len(CASES), "min_s": 1e-4} for case in CASES}
        if micro
        else None,
        "ratio_to_local": ratio,
        "fingerprint": {"client": client, "devices": [DEVICE] * (2 if remote else 1)},
    }
    return {
        "group": workload,
        "name": name,
        "fullname": f"bench_tests/test_{workload}.py::{name}",
        "extra_info": info | more,
        "stats": stats(samples(median_s, rounds, seed)),
    }


def link(rounds: int = 500) -> dict[str, Any]:
    made = cell(
        "link", "genie_local_remote", 2e-4, rounds=rounds, ratio=None, phases_ms={}, setup_ms={}, llm=None
    )
    made |= {
        "group": "link: empty round trip",
        "name": "test_empty_round_trip",
        "fullname": "b::test_empty_round_trip",
    }
    made["extra_info"]["link"] = {"case": "empty round trip", "raw_median_s": 1.6e-4, "time_ratio": 1.25}
    return made


def matrix(scale: float = 1.0, seed: int = 0) -> list[dict[str, Any]]:
    """All 35 cells and a link benchmark; each cell has a ratio of its own, from 0.4 to 30."""
    rng = random.Random(seed)
    made = []
    for w, workload in enumerate(WORKLOADS):
        for b, baseline in enumerate(BASELINES):
            ratio = 1.0 if b == 0 else 0.4 * 1.137 ** (7 * w + b)
            time_s = 0.05 * ratio * scale * rng.lognormvariate(0, 0.03)
            made.append(cell(workload, baseline, time_s, ratio=ratio, seed=seed * 100 + 7 * w + b))
    return [*made, link()]


def document(
    benchmarks: list[dict[str, Any]], commit: str = "a" * 40, hour: int = 0, **more: Any
) -> dict[str, Any]:
    return {
        "machine_info": {},
        "commit_info": {"id": commit, "dirty": False, "branch": "main"},
        "datetime": f"2026-01-{1 + hour // 24:02}T{hour % 24:02}:00:00+00:00",
        "benchmarks": benchmarks,
        "genie": {"ceiling": {"devices": 2, "speedup": 1.9, "one_gflops": 75.0, "all_gflops": 142.5}},
    } | more


def write(path: Path, benchmarks: list[dict[str, Any]], **more: Any) -> Path:
    path.write_text(json.dumps(document(benchmarks, **more)))
    return path
