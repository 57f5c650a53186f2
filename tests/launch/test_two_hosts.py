"""Servers on hosts of their own (network namespaces), clients on a third."""

import os
import subprocess
import sys

import pytest

import genie
from genie.devices import device_slot
from genie.errors import AuthError, ConnectError
from genie.launch.pool_file import read_pool
from genie.runtime.server_process import ServerProcess
from tests.launch.netns import two_hosts  # noqa: F401  (a fixture)
from tests.launch.processes import TOKEN, computes, gone, make_certificate

pytestmark = pytest.mark.timeout(240)


def test_a_pool_over_two_hosts(two_hosts, tmp_path):  # noqa: F811
    """What srun sets, on both; the address of each is found from that of the first."""
    members = []
    try:
        for rank, host in enumerate(two_hosts):
            environ = {
                "GENIE_TOKEN": TOKEN, "SLURM_PROCID": str(rank), "SLURM_LOCALID": "0", "SLURM_NTASKS": "2",
                "SLURM_JOB_ID": "1", "MASTER_ADDR": two_hosts[0].address,
            }  # fmt: skip
            command = [sys.executable, *("-m", "genie", "serve", "--pool", "pool.json", "--insecure")]
            members.append(
                host.popen([*command, "--device", "cpu"], cwd=tmp_path, env=os.environ | environ,
                           stdin=subprocess.DEVNULL)
            )  # fmt: skip
        pool = read_pool(tmp_path / "pool.json", 110)
        assert [each.rpartition(":")[0] for each in pool.addresses] == [host.address for host in two_hosts]
        assert [computes(each) for each in pool.addresses] == [member.pid for member in members]
        with pytest.raises(AuthError):
            genie.connect(pool.addresses[0], "another token")
    finally:
        for member in members:
            member.terminate()
        for member in members:
            member.wait(10)
    assert not (tmp_path / "pool.json").exists()


def test_a_server_with_tls_on_another_host(two_hosts, tmp_path):  # noqa: F811
    server_host, client_host = two_hosts
    cert, key = make_certificate(tmp_path, f"IP:{server_host.address}")
    args = ["--host", server_host.address, "--tls-cert", cert, "--tls-key", key]
    with server_host.entered():
        # Without --token-file: a token in the environment counts as one that was given.
        server = ServerProcess.start(device_slot("cpu", 0), token=TOKEN, log_dir=tmp_path, extra_args=args)
    with server:
        assert computes(server.address, tls_ca=cert) == server.pid
        with client_host.entered():
            assert computes(server.address, tls_ca=cert) == server.pid
            with pytest.raises(ConnectError):
                genie.connect(f"127.0.0.1:{server.address.rpartition(':')[2]}", TOKEN)
    assert gone([server.pid])
