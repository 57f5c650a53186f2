"""Result files as INPUTS to a decision: made up, in the suite's schema, so that the right answer is known."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from statistics import median

from genie.bench.record import SCHEMA_VERSION
from genie.bench.results import Result, parse_result

DEVICE = {"type": "cpu", "model": "a CPU", "cores": [0], "torch": "2.13.0"}
FINGERPRINT = {
    "client": {"cpu_model": "a CPU", "cores": [0, 1], "machine": "x86_64", "libraries": {"torch": "2.13.0"}},
    "devices": [DEVICE],
}
RECEIPT = {"pid": 1, "device": "cpu", "ops": 50, "programs": 5, "digest": "d"}
CASE_BYTES = {"bytes_out": 1, "bytes_in": 1}
ROUNDS = (1.01, 0.99, 1.0, 1.02, 0.98)


def cell_id(baseline="genie_full", workload="decode"):
    return f"bench_tests/test_{workload}.py::test_{workload}[{baseline}]"


def cell(baseline="genie_full", seconds=0.1, workload="decode", rounds=ROUNDS, cases=None, wire=None, **info):
    """One stored benchmark; ``rounds`` are multiples of ``seconds``, and ``wire`` overrides its counters."""
    data = [seconds * factor for factor in rounds]
    local = baseline == "local_pytorch"
    bytes_out = 0 if local else 1000
    counters = {
        "bytes_out": bytes_out,
        "bytes_in": bytes_out,
        "round_trips": 0 if local else 9,
        "peer_bytes": 0,
    }
    return {
        "fullname": cell_id(baseline, workload),
        "name": f"test_{workload}[{baseline}]",
        "group": workload,
        "stats": {"median": median(data), "data": data},
        "extra_info": {
            "schema_version": SCHEMA_VERSION,
            "baseline": baseline,
            "ablated": [],
            "workload": workload,
            "profile": "smoke",
            "params": {},
            "model": {"name": "a model", "params": 10, "dtype": "float32"},
            "verified": {"ok": True, "kind": "tokens", "max_abs_err": None},
            "wire": counters | (wire or {}),
            "receipt": None if local else copy.deepcopy(RECEIPT),
            "receipts": [] if local else [{"counters": {"stateless": 1}}],
            "weights": {"source": "seeded", "sha256": "00"},
            "fingerprint": copy.deepcopy(FINGERPRINT),
            "cpu_s": {"client": seconds, "server": 0.0 if local else seconds},
            "rounds": len(data),
            "cases": cases and {case: {"median_s": value} | CASE_BYTES for case, value in cases.items()},
        }
        | info,
    }  # fmt: skip


def run(*cells, commit="c" * 40) -> dict:
    """The content of a result file."""
    return {
        "machine_info": {},
        "commit_info": {"id": commit, "dirty": False, "branch": "main"},
        "datetime": "2026-01-01T00:00:00",
        "benchmarks": list(cells),
    }


def result(*cells) -> Result:
    return parse_result(run(*cells), Path("made-up.json"))


def write(path: Path, *cells) -> Path:
    path.write_text(json.dumps(run(*cells)))
    return path
