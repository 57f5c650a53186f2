"""Cells of the suite on servers that it has not started, or that an engine has started for it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launch.processes import TOKEN

REPOSITORY = Path(__file__).parents[2]
pytestmark = pytest.mark.timeout(300)

# Runs of pytest, one after the other, in one process that imports torch once.
RUNNER = """
import json, sys, pytest
for arguments in json.loads(sys.argv[1]):
    print("RUN", flush=True)
    print("EXIT", int(pytest.main(arguments)), flush=True)
"""
SUITE = (
    "bench_tests", "--benchmark-only", "-q", "-k", "vision", "--genie-device", "cpu", "--genie-rounds", "1",
    "--genie-profile", "smoke", "--genie-no-ceiling", "-p", "no:cacheprovider",
)  # fmt: skip


@pytest.fixture(scope="module")
def cells(across, address, tmp_path_factory):
    """By engine and baseline what the smallest workload's cell saved; a user would give the same options."""
    folder = tmp_path_factory.mktemp("cells")
    runs = {
        "pool file": [
            *("--genie-address", str(across.file), "--genie-tls-ca", across.certificate),
            *("--genie-baselines", "local_pytorch,genie_full", "--genie-ablate", "cost_model"),
        ],
        "torchrun": [
            *("--genie-launcher", "torchrun", "--genie-servers", "1"),
            *("--genie-baselines", "local_pytorch,genie_local_remote"),
        ],
        "ray": [
            *("--genie-launcher", "ray", "--genie-ray-address", address, "--genie-servers", "2"),
            *("--genie-baselines", "local_pytorch,genie_no_semantics"),
        ],
    }
    saved = [folder / f"{number}.json" for number in range(len(runs))]
    plan = [
        [*SUITE, *run, f"--benchmark-json={path}"] for run, path in zip(runs.values(), saved, strict=True)
    ]
    done = subprocess.run(
        [sys.executable, "-c", RUNNER, json.dumps(plan)],
        cwd=REPOSITORY, env=os.environ | {"GENIE_TOKEN": TOKEN}, capture_output=True, text=True, timeout=240,
        check=False,
    )  # fmt: skip
    assert done.stdout.count("EXIT 0") == len(runs), done.stdout + done.stderr
    assert "ray" not in done.stderr, "Ray writes into the user's run"
    found = {}
    for name, path in zip(runs, saved, strict=True):
        told = [each["extra_info"] for each in json.loads(path.read_text())["benchmarks"]]
        found[name] = {each["baseline"]: each for each in told}
        assert all(each["verified"]["ok"] for each in found[name].values())
    return found


def test_servers_of_other_hosts_by_their_pool_file(cells, across):
    remote = cells["pool file"]["genie_full"]
    assert remote["devices"] == 2
    assert sorted(each["pid"] for each in remote["receipts"]) == sorted(across.pids), "both had work"
    assert remote["wire"]["peer_bytes"] > 0


def test_servers_that_torchrun_starts(cells):
    remote = cells["torchrun"]["genie_local_remote"]
    assert remote["devices"] == 1
    assert remote["receipt"]["pid"] > 0


def test_servers_that_ray_starts(cells):
    remote = cells["ray"]["genie_no_semantics"]
    assert remote["devices"] == 2
    assert remote["receipt"]["pid"] > 0
