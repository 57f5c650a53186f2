"""``--genie-launcher ray``: servers that a real Ray cluster starts, and that are never left behind.

The cluster has as many CPUs as a pool has servers: that the next pool starts shows that the last one's
actors and placement group are gone.
"""

import importlib.util
import os
import re
import signal
import subprocess
import sys
from contextlib import closing

import pytest

from genie.errors import ConfigError, ConnectError, ServerLostError
from genie.launch.bind import Bind
from genie.launch.ray_servers import RayServers
from genie.runtime.child_process import session_members
from tests.launch.netns import two_hosts  # noqa: F401  (a fixture)
from tests.launch.processes import computes, gone, make_certificate, until
from tests.launch.ray_nodes import ray_cluster

if importlib.util.find_spec("ray") is None:  # not imported: that would spoil the baseline's tests
    pytest.skip("needs ray", allow_module_level=True)
pytestmark = pytest.mark.timeout(300)

INTERRUPTED = """
import time

def test_servers(genie_servers):
    print("PIDS", *genie_servers.pids, flush=True)
    time.sleep(100)
"""


def test_a_server_that_died_is_told_with_its_log(address, tmp_path):
    with closing(RayServers(2, "cpu", tmp_path, address=address)) as servers:
        assert {computes(each, servers.token) for each in servers.require(2)} == servers.pids
        assert all(each.startswith("127.0.0.1:") for each in servers.addresses)
        assert [facts.cores for facts in servers.facts(2)] == [1, 1]
        first, second = (server["pid"] for server in servers._servers)
        os.kill(first, signal.SIGKILL)
        # Some moments may pass between the end of its first thread and that of its last.
        assert until(lambda: lost(servers) is not None)
        assert re.search(r"(?s)has died.*ready on", str(lost(servers)))
        assert computes(servers.addresses[1], servers.token) == second
        # Without its driver, which can then close nothing, nothing stays either.
        os.kill(servers._driver.pid, signal.SIGKILL)
        assert gone([second], 40)
        with pytest.raises(ServerLostError, match="driver of the servers is gone"):
            servers.require(2)
    assert session_members(servers._driver.pid) == []


def lost(servers):
    try:
        servers.require(2)
    except ServerLostError as error:
        return error
    return None


def test_an_interrupted_run_leaves_no_server(address, pytester):
    pytester.makepyfile(INTERRUPTED)
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "pytest", "-q", "-s", "--genie-launcher", "ray", "--genie-device", "cpu"),
            *("--genie-ray-address", address, "--genie-servers", "1"),
        ],
        cwd=pytester.path, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    try:
        line = next(line for line in process.stdout if line.startswith("PIDS"))
        process.send_signal(signal.SIGINT)
        assert gone(map(int, line.split()[1:]), 40)
        assert process.wait(40) == pytest.ExitCode.INTERRUPTED
    finally:
        process.kill()
        process.wait(10)
        process.stdout.close()


def test_a_pool_that_does_not_fit_says_what_there_is(address, tmp_path):
    with pytest.raises(ConnectError, match=r"3 servers with 1 CPU each.*has 2 CPU"):
        RayServers(3, "cpu", tmp_path, address=address, start_timeout_s=4)


def test_without_a_cluster_the_error_says_how_to_start_one(tmp_path):
    with pytest.raises(ConnectError, match="ray start --head"):
        RayServers(1, "cpu", tmp_path, address="127.0.0.1:1")
    with pytest.raises(ConfigError, match="client protocol is not supported"):
        RayServers(1, "cpu", tmp_path, address="ray://127.0.0.1:10001")


def test_servers_on_two_hosts(two_hosts, tmp_path):  # noqa: F811
    cert, key = make_certificate(tmp_path, *(f"IP:{host.address}" for host in two_hosts))
    with ray_cluster(1, *two_hosts) as address, two_hosts[0].entered():
        with pytest.raises(ConfigError, match=rf"other nodes \({two_hosts[1].address}\).*--genie-insecure"):
            RayServers(2, "cpu", tmp_path, address=address)
        with closing(RayServers(2, "cpu", tmp_path, address=address, bind=Bind(cert, key))) as servers:
            hosts = {each.rpartition(":")[0] for each in servers.addresses}
            assert hosts == {host.address for host in two_hosts}
            pids = {computes(each, servers.token, servers.tls_ca) for each in servers.require(2)}
            assert pids == servers.pids
    assert gone(pids)
