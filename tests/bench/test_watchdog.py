"""A request that blocks in a system call is ended; one that answers in time is left alone."""

import signal
import socket
import threading
import time

import pytest

from genie.bench.watchdog import Watchdog
from genie.errors import ServerLostError


def test_a_blocked_receive_ends_with_an_error():
    before = signal.getsignal(signal.SIGUSR2)
    client, server = socket.socketpair()
    start = time.monotonic()
    with client, server, Watchdog("a cell") as watchdog:
        silence = pytest.raises(ServerLostError, match="a cell: request 7 got no answer within 0 s")
        with silence, watchdog.limit(0.1, "request 7"):
            client.recv(1)
        server.send(b"x")
        with watchdog.limit(60.0, "request 8"):
            assert client.recv(1) == b"x"
    assert time.monotonic() - start < 10
    assert signal.getsignal(signal.SIGUSR2) is before
    assert "genie-watchdog" not in {thread.name for thread in threading.enumerate()}
