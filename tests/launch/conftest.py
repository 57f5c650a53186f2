"""A pool whose servers are on two hosts (network namespaces), tests being on a third; a Ray cluster."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from genie.launch.pool_file import PoolFile, read_pool
from tests.launch.netns import Cable, Host, hosts, why_not
from tests.launch.processes import TOKEN, make_certificate
from tests.launch.ray_nodes import ray_cluster

START_S = 110


@dataclass(frozen=True)
class Across:
    """``cable`` is what the servers are to talk to each other by; ``certificate``: whom clients trust."""

    hosts: list[Host]
    cable: Cable
    file: Path
    pool: PoolFile
    pids: list[int]
    certificate: str


@pytest.fixture(scope="package")
def across(tmp_path_factory) -> Iterator[Across]:
    """With TLS and a token, started as srun would, which says nothing of addresses. No test may end them."""
    if reason := why_not():
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("across")
    members: list[subprocess.Popen] = []
    with hosts(2) as both:
        cert, key = make_certificate(folder, *(f"IP:{host.address}" for host in both))
        cable = Cable(both)
        try:
            for rank, host in enumerate(both):
                environ = {
                    "GENIE_TOKEN": TOKEN, "MASTER_ADDR": both[0].address, "SLURM_PROCID": str(rank),
                    "SLURM_LOCALID": "0", "SLURM_NTASKS": "2", "SLURM_JOB_ID": "1",
                }  # fmt: skip
                command = [
                    *(sys.executable, "-m", "genie", "serve", "--pool", "pool.json", "--device", "cpu"),
                    *("--tls-cert", cert, "--tls-key", key, "--peer-host", cable.addresses[rank]),
                ]
                with open(folder / f"{rank}.log", "wb") as log:
                    members.append(
                        host.popen(command, cwd=folder, env=os.environ | environ, stdin=subprocess.DEVNULL,
                                   stdout=log, stderr=log)
                    )  # fmt: skip
            file = folder / "pool.json"
            pool = read_pool(file, START_S)
            yield Across(both, cable, file, pool, [member.pid for member in members], cert)
            assert [member.poll() for member in members] == [None, None], "a server has died"
        finally:
            for member in members:
                member.terminate()
            for member in members:
                member.wait(10)
    assert not file.exists(), "rank 0 has left its pool file behind"


@pytest.fixture(scope="package")
def address() -> Iterator[str]:
    """Of a Ray cluster on this host with two CPUs, which each test leaves unused."""
    pytest.importorskip("ray")
    with ray_cluster(2) as found:
        yield found
