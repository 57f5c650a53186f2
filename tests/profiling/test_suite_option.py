"""``--genie-trace DIR``: one more request of each Genie cell, which is never a timed one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from genie.bench.options import read_options
from tests.profiling.traces import Trace

REPOSITORY = Path(__file__).parents[2]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pytest", "bench_tests/test_llm_decode.py", "--benchmark-only", "-q",
         "-p", "no:cacheprovider", "--genie-profile", "smoke", "--genie-device", "cpu", *arguments],
        cwd=REPOSITORY, capture_output=True, text=True, timeout=110,
    )  # fmt: skip


def test_each_genie_cell_leaves_a_trace_of_one_more_request(tmp_path) -> None:
    folder, saved = tmp_path / "traces", tmp_path / "out.json"
    baselines = "local_pytorch,genie_capture_only,genie_local_remote"
    done = run("--genie-trace", str(folder), "--genie-baselines", baselines, "--benchmark-json", str(saved))
    assert done.returncode == 0, done.stdout + done.stderr
    names = {"llm_decode-genie_capture_only.json.gz", "llm_decode-genie_local_remote.json.gz"}
    assert {p.name for p in folder.iterdir()} == names
    assert all(f"trace: {folder / name}" in done.stdout for name in names)
    remote = Trace(folder / "llm_decode-genie_local_remote.json.gz")
    remote.check()
    benches = {b["extra_info"]["baseline"]: b for b in json.loads(saved.read_text())["benchmarks"]}
    assert all(b["stats"]["rounds"] == 3 for b in benches.values())
    # One request: what its receipt counts is what the trace shows.
    ran = [s.args["ops"] for s in remote.named("execute")]
    assert sum(ran) == benches["genie_local_remote"]["extra_info"]["receipt"]["ops"]
    assert len({s.args["nonce"] for s in remote.named("program")}) == 1


def test_a_folder_that_cannot_be_made_is_a_usage_error(pytester) -> None:
    with pytest.raises(pytest.UsageError, match=r"--genie-trace: .* name a folder"):
        read_options(pytester.parseconfig("--genie-trace", __file__), {})
    assert read_options(pytester.parseconfig("--genie-trace", "made/here"), {}).trace == Path("made/here")
    assert Path("made/here").is_dir()
