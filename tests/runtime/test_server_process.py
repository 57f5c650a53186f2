"""Server processes start fast, tell what went wrong, and never outlive their parent."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time

import psutil
import pytest

from genie.devices import DeviceSlot, device_slot
from genie.errors import ConnectError
from genie.runtime.server_process import ServerProcess, start_servers
from genie.wire.messages import Ping
from tests.server.programs import TOKEN, connect


def wait_until_gone(pid: int, seconds: float = 8) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.02)
    return False


def test_servers_start_side_by_side_on_their_own_cores(tmp_path):
    slots = [device_slot("cpu", 0), device_slot("cpu", 1)]
    os.sched_setaffinity(0, slots[0].cores)  # the parent's pinning is not inherited
    try:
        servers = start_servers(slots, token=TOKEN, log_dir=tmp_path)
    finally:
        os.sched_setaffinity(0, {c for s in slots for c in s.cores})
    try:
        assert len({s.address for s in servers}) == 2
        for slot, server in zip(slots, servers, strict=True):
            assert tuple(psutil.Process(server.pid).cpu_affinity()) == slot.cores
            assert server.device.startswith(f"cpu:{slot.index}")
            after_import = re.search(r"after it ([\d.]+) s", server.log_tail())
            assert float(after_import[1]) < 1
            with connect(server) as c:
                assert c.request(Ping())
    finally:
        for server in servers:
            server.close()
            server.close()
    assert not any(s.alive() for s in servers)
    assert "stopped" in servers[0].log_tail()


def test_a_server_that_cannot_start_says_why_and_takes_the_others_along(tmp_path):
    before = psutil.Process().children()
    impossible = DeviceSlot("cpu", 1, (4095,))
    with pytest.raises(ConnectError, match=r"(?s)could not start.*cores"):
        start_servers([device_slot("cpu", 0), impossible], token=TOKEN, log_dir=tmp_path)
    assert psutil.Process().children() == before


def test_a_server_that_is_too_slow_is_given_up(tmp_path):
    before = psutil.Process().children()
    with pytest.raises(ConnectError, match="not ready in time"):
        ServerProcess.start(device_slot("cpu", 0), token=TOKEN, log_dir=tmp_path, ready_seconds=0.05)
    assert psutil.Process().children() == before


def test_a_server_dies_with_a_parent_that_is_killed(tmp_path):
    code = (
        "import sys, time; from pathlib import Path; from genie.devices import device_slot\n"
        "from genie.runtime.server_process import ServerProcess\n"
        f"s = ServerProcess.start(device_slot('cpu', 0), token='t', log_dir=Path({str(tmp_path)!r}))\n"
        "print(s.pid, flush=True); time.sleep(60)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    pid = int(parent.stdout.readline())
    assert psutil.pid_exists(pid)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    parent.stdout.close()
    assert wait_until_gone(pid)


def test_a_server_stops_at_the_end_of_its_stdin_with_a_session_open(tmp_path):
    with ServerProcess.start(device_slot("cpu", 0), token=TOKEN, log_dir=tmp_path) as server:
        session = connect(server)
        server._process.stdin.close()
        assert wait_until_gone(server.pid)
        assert server._process.wait() == 0
        session.close()
