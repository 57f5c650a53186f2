"""The kernel's byte counters against transfers of known size over real sockets."""

from __future__ import annotations

import multiprocessing
import os
import socket
import time
from collections.abc import Iterator

import pytest

from genie.baselines import tcp_counters
from genie.baselines.tcp_counters import EndBytes, moved, settled, snapshot
from genie.errors import MeasurementError, WireCountError

pytestmark = pytest.mark.timeout(30)


def _echo(port: int, family: int) -> None:
    """Answers every 1000 bytes received with 300; ends when the peer closes."""
    with socket.socket(family) as sock:
        sock.connect(("127.0.0.1" if family == socket.AF_INET else "::ffff:127.0.0.1", port))
        while True:
            left = 1000
            while left:
                data = sock.recv(left)
                if not data:
                    return
                left -= len(data)
            sock.sendall(b"y" * 300)


@pytest.fixture(params=[socket.AF_INET, socket.AF_INET6], ids=["ipv4", "mapped"])
def far_end(request) -> Iterator[tuple[int, socket.socket]]:
    """(pid of another process, our socket connected to it); the other end may be dual-stack."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        process = multiprocessing.get_context("spawn").Process(
            target=_echo, args=(server.getsockname()[1], request.param), daemon=True
        )
        process.start()
        assert process.pid is not None
        sock, _ = server.accept()
        with sock:
            yield process.pid, sock
        process.join(5)
        assert process.exitcode == 0


def _exchange(sock: socket.socket, times: int) -> None:
    for _ in range(times):
        sock.sendall(b"x" * 1000)
        left = 300
        while left:
            left -= len(sock.recv(left))


def test_both_ends_count_the_payload_exactly(far_end):
    pid, sock = far_end
    before = settled([os.getpid()], [pid])
    assert len(before) == 1
    _exchange(sock, 7)
    assert moved(before, settled([os.getpid()], [pid])) == EndBytes(7000, 2100, 7000, 2100)


def test_a_connection_opened_since_counts_from_zero(far_end):
    pid, sock = far_end
    _exchange(sock, 2)
    assert moved({}, settled([os.getpid()], [pid])) == EndBytes(2000, 600, 2000, 600)


def test_connections_of_other_processes_are_left_out(far_end):
    pid, sock = far_end
    _exchange(sock, 1)
    assert snapshot([os.getpid()], [os.getpid()]) == {}
    assert snapshot([pid], [pid]) == {}


def test_a_connection_closed_in_between_is_an_error(far_end):
    pid, sock = far_end
    before = settled([os.getpid()], [pid])
    sock.close()
    with pytest.raises(WireCountError, match="1 of 1 connections"):
        moved(before, snapshot([os.getpid()], [pid]))


def test_a_half_closed_connection_of_anyone_does_not_disturb_the_reading():
    with socket.create_server(("127.0.0.1", 0)) as server:
        near = socket.create_connection(server.getsockname())
        with server.accept()[0] as far:
            near.close()
            assert far.recv(1) == b""
            # What is left of `near` waits for our end to close; the kernel drops its counters a delayed
            # acknowledgement (40 ms) after the close.
            for _ in range(20):
                open_ends = [one.local for one in tcp_counters.tcp_sockets()]
                assert far.getsockname() in open_ends
                assert far.getpeername() not in open_ends
                time.sleep(0.005)


def test_a_kernel_without_counters_is_named_and_never_reported_as_zero(monkeypatch):
    monkeypatch.setattr(tcp_counters, "_NETLINK_SOCK_DIAG", 31)  # no such protocol
    with pytest.raises(MeasurementError, match="NETLINK_SOCK_DIAG"):
        snapshot([os.getpid()], [1])


def test_a_kernel_without_sent_bytes_is_named(monkeypatch, far_end):
    monkeypatch.setattr(tcp_counters, "_TCP_INFO_NEEDED", 4096)
    with pytest.raises(MeasurementError, match=r"Linux 4\.19"):
        snapshot([os.getpid()], [far_end[0]])
