"""Whole runs in real pytest processes: what is saved, what is shown, what an interruption leaves."""

import json
import signal
import subprocess
import sys
import time

import pytest

KEYS = {
    "schema_version", "baseline", "workload", "profile", "features", "model", "setup_ms", "verified", "wire",
    "receipt", "phases_ms", "llm", "weights", "devices", "cpu_s", "rounds", "warmup", "cases", "client_cores",
    "fingerprint", "ablated",
}  # fmt: skip


def saved(path):
    data = json.loads(path.read_text())
    return data, {bench["name"]: bench for bench in data["benchmarks"]}


def test_only_verified_cells_are_saved(pytester, cells):
    arguments = cells(genie_full="RandomOutput", genie_local_remote="Remote")
    result = pytester.runpytest_subprocess(
        *arguments, "--benchmark-only", "--benchmark-json", "out.json", "--genie-rounds", "4",
        "--genie-baselines", "local_pytorch,genie_local_remote,genie_full",
    )  # fmt: skip
    result.assert_outcomes(passed=4, failed=2)
    data, benches = saved(pytester.path / "out.json")
    assert benches.keys() == {
        f"test_tiny[{baseline}{suffix}]"
        for baseline in ("local_pytorch", "genie_local_remote")
        for suffix in ("", "-batch4")
    }
    local = benches["test_tiny[local_pytorch]"]
    assert not KEYS - local["extra_info"].keys()
    assert (local["group"], local["stats"]["rounds"], len(local["stats"]["data"])) == ("tiny", 4, 4)
    assert local["extra_info"]["wire"]["bytes_out"] == 0
    assert local["extra_info"]["receipt"] is None
    assert benches["test_tiny[local_pytorch-batch4]"]["group"] == "tiny batch=4"
    assert data["machine_info"]["genie"]["libraries"]["torch"]
    assert "genie" not in data, "no timed cell used two devices, so nothing was measured about two"
    result.stdout.fnmatch_lines(
        [
            "tiny",
            "*baseline*median*x local*",
            "*local_pytorch*1.00*ok (allclose)",
            "*genie_full*FAILED",
            "*VerificationError: tiny on genie_full, round 0*",
            "6 cells: 4 verified (4 timed), 2 failed, 0 skipped",
        ]
    )


def test_the_parallel_sweep_runs_every_cell_once_and_times_none(pytester, cells):
    arguments = cells(ray_actor="RayStandIn")
    result = pytester.runpytest_subprocess(
        *arguments, "-n", "2", "-v", "--genie-baselines", "local_pytorch,ray"
    )
    result.assert_outcomes(passed=4)
    result.stdout.fnmatch_lines(["4 cells: 4 verified (0 timed), 0 failed, 0 skipped"])
    peer_workers = {line[:5] for line in result.outlines if "PASSED" in line and "test_tiny[ray" in line}
    assert len(peer_workers) == 1, "the cells of a peer share one worker, so that it makes one pool"


def test_ctrl_c_keeps_the_finished_cells(pytester, cells):
    arguments = cells(genie_full="Interrupts")
    process = subprocess.Popen(
        [
            sys.executable, "-m", "pytest", *arguments, "-s", "-k", "not batch4",
            "--benchmark-json", "out.json", "--genie-baselines", "local_pytorch,genie_full",
        ],
        cwd=pytester.path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        # A shell starts background jobs with SIGINT ignored, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    assert process.stdout is not None
    shown = []
    for line in process.stdout:
        shown.append(line)
        if "ROUND 1 RUNS" in line:
            break
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    shown.append(process.communicate(timeout=60)[0])
    assert process.returncode == pytest.ExitCode.INTERRUPTED, "".join(shown)
    assert saved(pytester.path / "out.json")[1].keys() == {"test_tiny[local_pytorch]"}
    assert "1 cells: 1 verified (1 timed), 0 failed, 0 skipped" in "".join(shown)


def test_the_plugin_stays_out_of_ordinary_runs(pytester):
    pytester.makepyfile("def test_it():\n    import sys\n    assert 'torch' not in sys.modules")
    result = pytester.runpytest_subprocess("--benchmark-json", "out.json")
    result.assert_outcomes(passed=1)
    assert "genie: cost of" not in result.stdout.str()
