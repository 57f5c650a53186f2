"""The pool of servers in real runs: shared, and never left behind."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from genie.runtime.child_process import session_members

POOL_USERS = """
import os, signal, time
import pytest
from genie.bench.sweep import pytest_configure_node, pytest_xdist_make_scheduler
from tests.bench import tiny

@pytest.fixture
def genie_local_remote(genie_session, genie_servers):
    with open("pools", "a") as pools:
        print(*genie_servers.require(1), *genie_servers.pids, file=pools)
    genie_session.pool = None  # the stand-in's receipts and bytes are of another process
    return tiny.Remote("genie_local_remote")

@pytest.fixture(scope="session")
def signalled_again(genie_servers):
    # CI systems send more than one signal: here another one comes while the run is ending.
    yield
    os.kill(os.getpid(), signal.SIGTERM)

@pytest.fixture
def genie_full(genie_servers, signalled_again):
    print("PIDS", *genie_servers.pids, flush=True)
    time.sleep(60)
"""


@pytest.fixture
def pool_users(pytester, cells):
    arguments = cells()
    pytester.makeconftest(POOL_USERS)
    return (*arguments, "--genie-servers", "2", "-k", "not batch4")


def is_alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def gone(pids, seconds=10.0):
    deadline = time.monotonic() + seconds
    while any(map(is_alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.1)
    return not any(map(is_alive, pids))


def test_sigkill_of_pytest_leaves_no_server(pytester, pool_users):
    process = subprocess.Popen(
        [sys.executable, "-m", "pytest", *pool_users, "-s", "--genie-baselines", "genie_full"],
        cwd=pytester.path, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    pids = next(
        [int(pid) for pid in line.split("PIDS")[1].split()] for line in process.stdout if "PIDS" in line
    )
    assert len(pids) == 2
    os.kill(process.pid, signal.SIGKILL)
    process.communicate(timeout=10)
    assert gone(pids)


def test_sigterm_stops_servers_and_keeps_finished_cells_as_ctrl_c_does(pytester, pool_users):
    process = subprocess.Popen(
        [
            sys.executable, "-m", "pytest", *pool_users, "-s", "--benchmark-json", "out.json",
            "--genie-baselines", "local_pytorch,genie_full",
        ],
        cwd=pytester.path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    )  # fmt: skip
    assert process.stdout is not None
    shown = []
    for line in process.stdout:
        shown.append(line)
        if "PIDS" in line:
            break
    pids = [int(pid) for pid in shown[-1].split("PIDS")[1].split()]
    assert len(pids) == 2
    process.terminate()
    shown.append(process.communicate(timeout=60)[0])
    told = "".join(shown)
    assert process.returncode == pytest.ExitCode.INTERRUPTED, told
    assert "KeyboardInterrupt: SIGTERM" in told
    assert "1 cells: 1 verified (1 timed), 0 failed, 0 skipped" in told
    benches = json.loads((pytester.path / "out.json").read_text())["benchmarks"]
    assert [bench["name"] for bench in benches] == ["test_tiny[local_pytorch]"]
    assert not any(map(is_alive, pids)), "the run has ended before its servers"
    assert session_members(process.pid) == []


def test_xdist_workers_share_the_controllers_pool(pytester, pool_users, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(pytester.mkdir("temporary")))
    result = pytester.runpytest_subprocess(
        *pool_users[:-2], "-n", "2", "--genie-baselines", "genie_local_remote"
    )
    result.assert_outcomes(passed=2)
    pools = (pytester.path / "pools").read_text().splitlines()
    assert len(pools) == 2
    assert len(set(pools)) == 1
    assert gone([int(pid) for pid in pools[0].split()[1:]])
    assert not list((pytester.path / "temporary").glob("genie-logs-*"))
