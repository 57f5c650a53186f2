"""Who a member of a pool is, from what torchrun and srun put into the environment."""

import pytest
import torch

from genie.devices import available_cores, device_slot
from genie.errors import ConfigError, ConnectError
from genie.launch.member import own_address, rank_slot
from genie.launch.rank import Rank, first_host, read_rank

TORCHRUN = {
    "RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "n0",
    "MASTER_PORT": "29500", "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "2",
}  # fmt: skip
SLURM = {
    "SLURM_PROCID": "1", "SLURM_LOCALID": "0", "SLURM_NTASKS": "2", "SLURM_JOB_ID": "12345",
    "SLURM_JOB_NODELIST": "gpu[07-09]",
}  # fmt: skip


@pytest.fixture
def no_scontrol(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))


def test_torchrun():
    assert read_rank(TORCHRUN) == Rank("torchrun", 3, 1, 4, ("n0", 29500), store_runs=True, attempt=2)
    assert read_rank(TORCHRUN | {"LOCAL_WORLD_SIZE": "4"}).one_host


def test_slurm(no_scontrol):
    assert read_rank(SLURM) == Rank("slurm", 1, 0, 2, ("gpu07", 22345))


def test_slurm_meets_where_the_user_says():
    assert read_rank(SLURM | {"MASTER_ADDR": "10.1.2.3", "MASTER_PORT": "4000"}).master == ("10.1.2.3", 4000)


def test_slurm_asks_scontrol_where_it_is(monkeypatch, tmp_path):
    scontrol = tmp_path / "scontrol"
    scontrol.write_text(
        '#!/bin/sh\n[ "$1 $2 $3" = "show hostnames r[1,3]x" ] && /bin/echo r1x && /bin/echo r3x\n'
    )
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert read_rank(SLURM | {"SLURM_STEP_NODELIST": "r[1,3]x"}).master[0] == "r1x"


@pytest.mark.parametrize(
    ("names", "first"),
    [
        ("login1", "login1"),
        ("a,b", "a"),
        ("gpu[07-09,12],x1", "gpu07"),
        ("n[3,5]", "n3"),
        ("n-1[10-12]", "n-110"),
    ],
)
def test_the_first_host_without_scontrol(no_scontrol, names, first):
    assert first_host(names) == first


@pytest.mark.parametrize("names", ["", "r[1-2]n[3-4]", "r[1,3]x", "[1-3]"])
def test_a_list_that_only_scontrol_can_expand_is_an_error(no_scontrol, names):
    with pytest.raises(ConfigError, match="set MASTER_ADDR"):
        first_host(names)


@pytest.mark.parametrize(
    ("environ", "told"),
    [
        ({}, "neither torchrun nor srun"),
        ({name: value for name, value in TORCHRUN.items() if name != "MASTER_ADDR"}, "lacks MASTER_ADDR"),
        (TORCHRUN | {"RANK": "4"}, "RANK=4 is not a whole number below 4"),
        (TORCHRUN | {"MASTER_PORT": "http"}, "MASTER_PORT=http"),
        ({name: value for name, value in SLURM.items() if name != "SLURM_NTASKS"}, "lacks SLURM_NTASKS"),
    ],
)
def test_a_bad_environment_names_the_variable(environ, told):
    with pytest.raises(ConfigError, match=told):
        read_rank(environ)


def test_the_local_rank_chooses_the_cores():
    assert rank_slot(read_rank(TORCHRUN), "cpu") == device_slot("cpu", 1)


def test_cores_that_srun_has_bound_are_kept():
    bound = read_rank(SLURM | {"MASTER_ADDR": "n0", "SLURM_CPU_BIND_TYPE": "mask_cpu:", "SLURM_LOCALID": "1"})
    assert rank_slot(bound, "cpu").cores == available_cores()
    shared = read_rank(SLURM | {"MASTER_ADDR": "n0", "SLURM_CPU_BIND_TYPE": "none", "SLURM_LOCALID": "1"})
    assert rank_slot(shared, "cpu") == device_slot("cpu", 1)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_task_that_sees_only_its_own_gpu_takes_that():
    own = read_rank(SLURM | {"MASTER_ADDR": "n0", "SLURM_GPUS_PER_TASK": "1", "SLURM_LOCALID": "7"})
    assert rank_slot(own, "cuda").index == 0


def test_the_address_on_the_way_to_rank_0():
    assert own_address(("127.0.0.1", 1)) == "127.0.0.1"
    with pytest.raises(ConnectError, match="MASTER_ADDR"):
        own_address(("name.invalid", 1))
