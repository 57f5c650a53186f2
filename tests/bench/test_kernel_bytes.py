"""The harness's own count of what crossed this process's sockets, against transfers of known size."""

import os
import socket

import pytest

from genie.baselines.protocol import Wire
from genie.bench import kernel_bytes
from genie.bench.kernel_bytes import OwnSockets, SocketBytes, check_kernel_bytes, moved, sockets_of
from genie.bench.pool import RunningServers
from genie.errors import MeasurementError, WireCountError

pytestmark = pytest.mark.timeout(30)


@pytest.fixture(params=["127.0.0.1", "::ffff:127.0.0.1"], ids=["ipv4", "mapped"])
def ends(request):
    """(address of the listener, our socket to it, the listener's own socket)."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with socket.create_connection((request.param, port)) as near, server.accept()[0] as far:
            yield f"127.0.0.1:{port}", near, far


def receive(sock, count):
    while count:
        count -= len(sock.recv(count))


def counted(sockets, before):
    return moved(before, sockets.read(), "here")


def test_both_directions_are_counted_to_the_byte(ends):
    address, near, far = ends
    sockets = OwnSockets([address])
    before = sockets.read()
    assert len(before) == 1
    near.sendall(b"x" * 1000)
    receive(far, 1000)
    far.sendall(b"y" * 300)
    receive(near, 300)
    assert counted(sockets, before) == SocketBytes(sent=1000, received=300)


def test_bytes_that_wait_for_the_receiver_count_as_sent(ends):
    address, near, _far = ends
    sockets = OwnSockets([address])
    before = sockets.read()
    near.setblocking(False)
    sent = 0
    with pytest.raises(BlockingIOError):
        while True:
            sent += near.send(b"x" * 65536)
    assert counted(sockets, before) == SocketBytes(sent=sent)


def test_without_addresses_every_connection_of_this_process_counts(ends):
    _address, near, far = ends
    sockets = OwnSockets(None)
    before = sockets.read()
    near.sendall(b"x" * 1000)
    receive(far, 1000)
    assert counted(sockets, before) == SocketBytes(sent=1000, received=1000)


def test_connections_to_others_are_left_out(ends):
    address, near, _far = ends
    port = near.getsockname()[1]
    assert OwnSockets(["127.0.0.1:1"]).read() == {}
    assert len(OwnSockets([f"127.0.0.1:{port}", address]).read()) == 2, "the listener's end has our port"


def test_a_server_may_be_given_by_name():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)):
            assert len(OwnSockets([f"localhost:{port}", "no-such-host.invalid:1"]).read()) == 1


def test_reading_leaves_the_owners_socket_as_it_was(ends):
    address, near, _far = ends
    socket.setdefaulttimeout(5.0)
    try:
        OwnSockets([address]).read()
    finally:
        socket.setdefaulttimeout(None)
    assert os.get_blocking(near.fileno())


def test_a_connection_opened_since_counts_from_zero(ends):
    address, near, far = ends
    near.sendall(b"x" * 1000)
    receive(far, 1000)
    assert counted(OwnSockets([address]), {}) == SocketBytes(sent=1000)


def test_a_connection_closed_in_between_is_an_error(ends):
    address, near, _far = ends
    sockets = OwnSockets([address])
    before = sockets.read()
    near.close()
    with pytest.raises(WireCountError, match="1 of 1 connections to the servers closed"):
        counted(sockets, before)


def test_a_kernel_without_these_counters_is_named_and_never_read_as_zero(ends, monkeypatch):
    monkeypatch.setattr(kernel_bytes, "_TCP_INFO_NEEDED", 4096)
    with pytest.raises(MeasurementError, match=r"Linux 4\.19"):
        OwnSockets([ends[0]]).read()


@pytest.mark.parametrize("exact", [True, False])
def test_a_report_that_fits_is_believed(exact):
    check_kernel_bytes(SocketBytes(100, 50), Wire(100, 50), exact=exact, where="here")


@pytest.mark.parametrize(
    ("wire", "exact", "message"),
    [
        (Wire(101, 50), True, "reports 101 bytes out, but the kernel counted 100"),
        (Wire(100, 49), True, "reports 49 bytes in, but the kernel counted 50"),
        (Wire(9000, 50), False, "reports 9000 bytes out, but the kernel counted 100"),
    ],
)
def test_a_report_of_other_bytes_is_refused(wire, exact, message):
    with pytest.raises(WireCountError, match=message):
        check_kernel_bytes(SocketBytes(100, 50), wire, exact=exact, where="here")


def test_what_is_read_depends_on_who_holds_the_sockets(ends):
    address, _near, _far = ends
    pool = RunningServers([address], token="")
    genie, peer = sockets_of("genie_full", True, pool), sockets_of("pytorch_rpc", True, pool)
    assert len(genie.read()) == 1
    assert len(peer.read()) >= 2, "both ends are in this process"
    assert sockets_of("ray", True, pool) is None
    assert sockets_of("local_pytorch", False, pool) is None
