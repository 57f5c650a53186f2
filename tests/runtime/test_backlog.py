"""Sending does not wait for a busy server: what it does not take yet is copied, bounded, and follows."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import statistics
import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from genie.devices import device_slot
from genie.errors import ProtocolError, ServerLostError
from genie.runtime.connection import Connection
from genie.runtime.server_process import ServerProcess
from genie.wire.backlog import Backlog
from genie.wire.messages import Counters, Execute, Ping, TensorSpec, Upload
from tests.server.programs import TOKEN, body, connect, execute, fetch

MIB = 1 << 20


@pytest.fixture(scope="module")
def busy(tmp_path_factory) -> Iterator[ServerProcess]:
    """A server without a limit on memory, which the tests keep busy or stop."""
    log_dir = tmp_path_factory.mktemp("busy")
    with ServerProcess.start(device_slot("cpu", 1), token=TOKEN, log_dir=log_dir) as process:
        yield process
        assert process.alive(), process.log_tail()


def upload(c: Connection, handle: int, data: np.ndarray) -> None:
    c.post(Upload(handle, TensorSpec("uint8", [len(data)], [1])), [data])


def work(c: Connection, seconds: float) -> None:
    """Has the server compute for about so long; answered by a receipt."""
    size = 512
    c.request(
        Execute("n", inputs=[(900, TensorSpec("float32", [size, size], [size, 1]))]),
        [np.zeros(size * size * 4, np.uint8)],
    )
    mm = body(*[("aten::mm", [["t"], ["t"]], [-1, -1])] * 50, n_ext=1, kept=[])
    c.request(execute(1, mm, ext=[900]))
    receipt = c.request(execute(1, ext=[900]))[0].receipt
    for _ in range(max(1, round(seconds * 1e3 / receipt.remote_ms))):
        c.post(execute(1, ext=[900], quiet=True))


class Stopped:
    """The server's process does nothing at all meanwhile."""

    def __init__(self, server: ServerProcess) -> None:
        self._pid = server.pid

    def __enter__(self) -> None:
        os.kill(self._pid, signal.SIGSTOP)

    def __exit__(self, *_: object) -> None:
        os.kill(self._pid, signal.SIGCONT)


def threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name == "backlog"]


def until(condition, seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_posting_to_a_busy_server_returns_early_and_another_works_meanwhile(server, busy):
    data = np.arange(200 * MIB, dtype=np.uint8)
    with connect(busy) as slow, connect(server) as other:
        work(slow, 3.0)
        started = time.monotonic()
        upload(slow, 1, data)
        posted = time.monotonic() - started
        data[:] = 0  # the buffer is the caller's again
        upload(other, 1, np.ones(1000, np.uint8))
        assert int(fetch(other, 1)[0].sum()) == 1000
        elsewhere = time.monotonic() - started
        (there,) = fetch(slow, 1)
        whole = time.monotonic() - started
        assert posted < 0.5 * whole
        assert elsewhere < 0.6 * whole
        assert torch.equal(there[:1000], torch.arange(1000).to(torch.uint8))
        assert int(there[-1]) == (len(data) - 1) % 256


def test_bytes_are_exact_when_they_are_read(busy):
    with connect(busy) as c:
        with Stopped(busy):
            upload(c, 1, np.zeros(40 * MIB, np.uint8))
            accepted = c.bytes_accepted
            assert c._channel.bytes_out < accepted - 20 * MIB
            assert threads() == ["backlog"]
        assert c.bytes_out == accepted == c.bytes_accepted
        until(lambda: not threads())  # it lives only as long as something waits
        sent, received = c.bytes_out, c.bytes_in
        reply, _ = c.request(Counters())
        assert (reply.bytes_in, reply.bytes_out) == (sent, received)


def test_a_full_backlog_makes_the_caller_wait(busy):
    c = Connection.connect(busy.address, TOKEN, backlog_bytes=8 * MIB)
    with c:
        done = threading.Event()

        def post() -> None:
            upload(c, 1, np.full(100 * MIB, 3, np.uint8))
            done.set()

        thread = threading.Thread(target=post)
        with Stopped(busy):
            thread.start()
            assert not done.wait(1.0)
            assert c._channel._backlog.waiting <= 8 * MIB
        assert done.wait(20)
        thread.join()
        (there,) = fetch(c, 1)
        assert there.numel() == 100 * MIB
        assert bool((there == 3).all())


def test_frames_keep_their_order(busy):
    with connect(busy) as c:
        rng = np.random.default_rng(0)
        sizes = [int(s) for s in rng.choice([1, 100, 70_000, 3 * MIB], 60)]
        with Stopped(busy):
            for k, size in enumerate(sizes):
                upload(c, k, np.full(size, k, np.uint8))
                c.send(Execute(f"n{k}", fetch=[k]))
        for k, size in enumerate(sizes):
            result, payload = c.receive()
            assert result.receipt.nonce == f"n{k}"
            assert payload.numel() == size
            assert bool((payload == k).all())


def test_large_requests_behind_large_replies_with_a_full_backlog(busy):
    size = 24 * MIB
    data = np.zeros(size, np.uint8)
    with Connection.connect(busy.address, TOKEN, backlog_bytes=MIB) as c:
        upload(c, 1, data)
        for _ in range(4):
            c.send(Execute("n", fetch=[1], inputs=[(2, TensorSpec("uint8", [size], [1]))]), [data])
        assert c.bytes_out == c.bytes_accepted  # reading it does not lock up either
        for _ in range(4):
            assert c.receive()[1].numel() == size


def test_a_server_that_is_killed_with_a_backlog(tmp_path):
    with ServerProcess.start(device_slot("cpu", 1), token=TOKEN, log_dir=tmp_path) as doomed:
        posting, waiting = connect(doomed), connect(doomed)
        os.kill(doomed.pid, signal.SIGSTOP)
        for c in (posting, waiting):
            upload(c, 1, np.zeros(50 * MIB, np.uint8))
        waiting.send(Ping())
        os.kill(doomed.pid, signal.SIGKILL)
        with pytest.raises(ServerLostError, match=doomed.address):
            waiting.receive()
        until(lambda: not threads())
        for _ in range(2):
            with pytest.raises(ServerLostError, match=doomed.address):
                posting.post(Ping())
        assert posting.bytes_out < posting.bytes_accepted
        for c in (posting, waiting):
            c.close()


def test_last_words_of_a_server_reach_a_client_with_a_backlog(busy):
    """The server refuses a frame and closes while more is on its way: its reason is what the caller gets."""
    with connect(busy) as c:
        with Stopped(busy):
            c._channel._backlog.send([memoryview(b"NOT A FRAME".ljust(64))], None)
            for k in range(8):
                upload(c, k, np.zeros(4 * MIB, np.uint8))
        with pytest.raises((ProtocolError, ServerLostError)) as caught:
            for _ in range(100):
                c.request(Ping())
        assert isinstance(caught.value, ProtocolError), caught.value
        assert "bad magic" in str(caught.value)


def test_closing_does_not_wait_for_a_server_that_does_not_read(busy):
    c = connect(busy)
    with Stopped(busy):
        upload(c, 1, np.zeros(50 * MIB, np.uint8))
        started = time.monotonic()
        c.close()
        assert time.monotonic() - started < 3
        until(lambda: not threads())


def test_a_small_request_costs_what_it_did():
    """The bytes of a ping through a backlog against the bare socket, interleaved."""
    a, b = socket.socketpair()
    with a, b:
        backlog, data, sink = Backlog(a), bytearray(60), bytearray(60)
        bare: list[float] = []
        ours: list[float] = []
        for k in range(4000):
            start = time.perf_counter_ns()
            if k % 2:
                a.send(data)
            else:
                backlog.send_now(data)
            (bare if k % 2 else ours).append(time.perf_counter_ns() - start)
            b.recv_into(sink)
        assert statistics.median(ours) < 1.5 * statistics.median(bare) + 1000
        backlog.close()


@pytest.mark.skipif(shutil.which("openssl") is None, reason="the openssl command is not installed")
def test_tls_sends_as_before(tmp_path):
    import subprocess

    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    command = (
        "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN=localhost"
    )
    names = ["-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1", "-keyout", str(key), "-out", str(cert)]
    subprocess.run([*command.split(), *names], check=True, capture_output=True, timeout=60)
    extra = ["--tls-cert", str(cert), "--tls-key", str(key)]
    with (
        ServerProcess.start(device_slot("cpu", 0), token=TOKEN, log_dir=tmp_path, extra_args=extra) as server,
        Connection.connect(server.address, TOKEN, tls_ca=str(cert)) as c,
    ):
        upload(c, 1, np.full(30 * MIB, 9, np.uint8))
        assert c.bytes_accepted == c.bytes_out > 30 * MIB
        assert bool((fetch(c, 1)[0] == 9).all())
        assert not threads()
