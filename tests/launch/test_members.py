"""``genie serve --pool`` under torchrun, and with what srun sets: real processes, sessions with each."""

import os
import signal
import socket
import subprocess
import sys
from contextlib import closing
from dataclasses import replace

import pytest

from genie import cli
from genie.errors import ConfigError, ConnectError, ServerLostError
from genie.launch.member import Member
from genie.launch.pool_file import read_pool
from genie.launch.rank import Rank
from genie.launch.torchrun_servers import TorchrunServers
from genie.server.process import ServeOptions
from tests.launch.processes import TOKEN, computes, gone, until

START_S = 110
pytestmark = pytest.mark.timeout(240)
RANK_0 = Rank("slurm", 0, 0, 1, ("127.0.0.1", 29500), one_host=True)
SERVE = ("-m", "genie", "serve", "--pool", "pool.json", "--device", "cpu")


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def start(tmp_path):
    """``start(command, log, **environ)`` in the test's folder; what is left at its end is killed."""
    started = []

    def run(command, log, **environ):
        with open(tmp_path / log, "wb") as output:
            process = subprocess.Popen(
                command, cwd=tmp_path, stdout=output, stderr=output, stdin=subprocess.DEVNULL,
                env=os.environ | {"GENIE_TOKEN": TOKEN} | environ,
            )  # fmt: skip
        started.append(process)
        return process

    yield run
    for process in started:
        process.kill()
        process.wait(10)


@pytest.fixture
def tasks(start, tmp_path):
    """``tasks(2)`` are ranks 0 and 1 of 2 as srun would start them, one server each."""
    port = str(free_port())

    def run(*ranks, size=2, arguments=()):
        return [
            start(
                [sys.executable, *SERVE, *arguments],
                f"{rank}.log",
                SLURM_PROCID=str(rank),
                SLURM_LOCALID=str(rank),
                SLURM_NTASKS=str(size),
                SLURM_STEP_NUM_NODES="1",
                SLURM_JOB_NODELIST="localhost",
                MASTER_PORT=port,
            )
            for rank in ranks
        ]

    return run


def test_torchrun(start, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    torchrun = start([*command, f"--master-port={free_port()}", *SERVE], "torchrun.log")
    pool = read_pool(tmp_path / "pool.json", START_S)
    assert [computes(address) for address in pool.addresses] == list(pool.pids)
    assert [device.split()[0] for device in pool.devices] == ["cpu:0", "cpu:1"]
    assert TOKEN not in (tmp_path / "pool.json").read_text()
    torchrun.kill()  # which by itself would leave its processes behind
    assert gone(pool.pids)
    assert until(lambda: not (tmp_path / "pool.json").exists())


def test_torchrun_ends_all_servers_when_one_dies(tmp_path):
    with closing(TorchrunServers(2, "cpu", tmp_path)) as servers:
        assert {computes(address, servers.token) for address in servers.require(2)} == servers.pids
        assert [facts.type for facts in servers.facts(2)] == ["cpu", "cpu"]
        os.kill(min(servers.pids), signal.SIGKILL)
        assert gone(servers.pids, 40)
        # torchrun itself needs a moment more than its servers
        assert until(lambda: ended(servers), 40)
        assert "SIGKILL" in servers.last_words()


def ended(servers):
    try:
        servers.require(2)
    except ServerLostError as error:
        return "torchrun has ended" in str(error)
    return False


def test_slurm_members_do_not_need_each_other_once_they_serve(tasks, tmp_path):
    first, second = tasks(0, 1)
    pool = read_pool(tmp_path / "pool.json", START_S)
    assert [computes(address) for address in pool.addresses] == list(pool.pids) == [first.pid, second.pid]
    first.kill()  # the one that had the store
    first.wait(10)
    assert computes(pool.addresses[1]) == second.pid
    second.terminate()
    assert second.wait(10) == 0


def test_a_rank_that_does_not_come_is_named(tmp_path):
    member = Member(replace(RANK_0, size=3, master=("127.0.0.1", free_port())), tmp_path / "pool.json", 0.3)
    with pytest.raises(ConnectError, match=r"not complete after 0\.3 s, member/1, member/2 did not come"):
        member.announce("127.0.0.1:7070", "cpu:0")
    assert not (tmp_path / "pool.json").exists()


def test_a_member_that_waits_can_be_stopped(tasks, tmp_path):
    (only,) = tasks(0)
    assert until(lambda: _listens(only.pid), START_S)
    only.send_signal(signal.SIGINT)
    assert only.wait(10) == -signal.SIGINT


def _listens(pid):
    listed = subprocess.run(["ss", "-tlnp"], capture_output=True, text=True, check=True).stdout
    return listed.count(f"pid={pid},") >= 2  # the server's port and the store's


def test_a_pool_file_of_an_earlier_run_is_not_taken_for_the_new_one(tmp_path):
    (tmp_path / "pool.json").write_text("old")
    Member(RANK_0, tmp_path / "pool.json")
    assert not (tmp_path / "pool.json").exists()


def test_what_the_rank_decides_is_not_for_the_user(tmp_path, capsys):
    member = Member(RANK_0, tmp_path / "pool.json")
    with pytest.raises(ConfigError, match="the rank chooses the number"):
        member.placed(ServeOptions(device="cpu:1"))
    with pytest.raises(ConfigError, match="give --host an address"):
        member.announce("0.0.0.0:7070", "cpu:0")
    assert cli.main(["serve", "--pool", "pool.json", "--cores", "0"]) == 2
    assert "taskset or srun --cpu-bind" in capsys.readouterr().err
