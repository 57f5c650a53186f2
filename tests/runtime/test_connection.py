"""The client's end: pipelining, typed errors, counters, and what happens when the server is gone."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import threading
import time

import numpy as np
import pytest
import torch

from genie.devices import device_slot
from genie.errors import (
    AuthError,
    ConfigError,
    ConnectError,
    ProtocolError,
    RemoteError,
    RemoteOpError,
    ServerLostError,
    SessionClosedError,
    UnsupportedOpError,
)
from genie.runtime.connection import Connection, exception_of, fetched_tensors, parse_address
from genie.runtime.server_process import ServerProcess
from genie.wire import auth
from genie.wire.framing import Channel
from genie.wire.messages import (
    PROTOCOL_VERSION,
    Challenge,
    ClientMessage,
    Counters,
    DeviceFacts,
    Error,
    Execute,
    Ping,
    Pong,
    TensorSpec,
    Upload,
    Welcome,
)
from tests.server.programs import DEVICE, TOKEN, connect, dense, fetch, floats

FACTS = DeviceFacts("cpu", "a CPU", 1, "2")


def test_welcome_names_the_server(server, connection):
    welcome = connection.welcome
    assert welcome.pid == server.pid
    assert welcome.device.startswith(f"{DEVICE}:0")
    assert welcome.torch_version == torch.__version__
    facts = welcome.facts
    assert (facts.type, facts.torch) == (DEVICE, torch.__version__)
    assert facts.cores >= 1
    assert facts.model in welcome.device


def test_both_ends_count_the_same_bytes(connection):
    spec, data = dense(torch.arange(100_000.0))
    connection.post(Upload(1, spec), [data])
    fetch(connection, 1)
    sent, received = connection.bytes_out, connection.bytes_in
    reply, _ = connection.request(Counters())
    assert (reply.bytes_in, reply.bytes_out) == (sent, received)
    assert sent > 400_000 < received
    assert connection.round_trips == 2


def test_replies_come_in_the_order_of_requests(connection):
    for k in range(10):
        connection.post(Upload(k, TensorSpec("float32", [1], [1])), [floats(k).numpy()])
    for k in range(10):
        connection.send(Execute(f"n{k}", fetch=[k]))
    for k in range(10):
        result, payload = connection.receive()
        assert result.receipt.nonce == f"n{k}"
        assert fetched_tensors(result, payload)[0].item() == k


def test_large_requests_can_be_pipelined_behind_large_replies(connection):
    size = 12 << 20
    data = np.zeros(size, np.uint8)
    connection.post(Upload(1, TensorSpec("uint8", [size], [1])), [data])
    for _ in range(4):
        connection.send(Execute("n", fetch=[1], inputs=[(2, TensorSpec("uint8", [size], [1]))]), [data])
    for _ in range(4):
        assert connection.receive()[1].numel() == size


def test_a_request_cannot_overtake_one_on_its_way(connection):
    connection.send(Ping())
    with pytest.raises(RuntimeError, match="receive"):
        connection.request(Ping())
    connection.receive()
    with pytest.raises(RuntimeError, match="without a request"):
        connection.receive()


@pytest.mark.parametrize("address", ["", "host", "host:", ":80", "host:0", "host:65536", "host:http"])
def test_bad_addresses_are_told(address):
    with pytest.raises(ConnectError, match="host:port"):
        Connection.connect(address, TOKEN)


def test_ipv6_addresses_parse():
    assert parse_address("[::1]:80") == ("::1", 80)


def test_an_unreachable_server_is_named_with_the_remedy():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(ConnectError, match=rf"{address}.*genie serve"):
        Connection.connect(address, TOKEN)


def test_a_server_that_says_nothing_is_given_up():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(ServerLostError, match="did not answer in time"):
            Connection.connect(address, TOKEN, timeout=0.2)


def fake_server(answer) -> str:
    listener = socket.create_server(("127.0.0.1", 0))

    def serve():
        with listener, listener.accept()[0] as sock:
            channel = Channel(sock, ClientMessage)
            channel.send(Challenge(PROTOCOL_VERSION, b"n" * 32))
            answer(channel, channel.receive()[0])

    threading.Thread(target=serve, daemon=True).start()
    return f"127.0.0.1:{listener.getsockname()[1]}"


def test_a_server_that_does_not_know_the_token_is_not_trusted():
    address = fake_server(lambda ch, _: ch.send(Welcome(b"?" * 32, 1, "cpu:0", "cpu", "2", 1, 0, FACTS)))
    with pytest.raises(AuthError, match="does not know the token"):
        Connection.connect(address, TOKEN)


def test_unasked_messages_and_garbage_break_the_connection_for_good():
    def answer(channel, message):
        mac = auth.server_mac(TOKEN, message.nonce)
        channel.send(Welcome(mac, 1, "cpu:0", "cpu", "2", 1, 0, FACTS))
        channel.receive()
        channel._sock.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

    with Connection.connect(fake_server(answer), TOKEN) as c:
        for _ in range(2):
            with pytest.raises(ProtocolError, match="bad magic"):
                c.request(Ping())


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("RemoteOpError", RemoteOpError),
        ("UnsupportedOpError", UnsupportedOpError),
        ("ConfigError", ConfigError),
        ("os", RemoteError),
        ("NoSuchError", RemoteError),
    ],
)
def test_errors_come_back_as_their_type(name, kind):
    exc = exception_of(Error(name, "what happened", "log line"))
    assert type(exc) is kind
    assert "what happened" in str(exc)
    if isinstance(exc, RemoteError):
        assert exc.log_tail == "log line"


def test_a_closed_connection_says_so(server):
    c = connect(server)
    c.close()
    c.close()
    with pytest.raises(SessionClosedError):
        c.request(Ping())


def post_for_ever(c: Connection) -> None:
    while True:
        c.post(Upload(1, TensorSpec("uint8", [1 << 20], [1])), [bytes(1 << 20)])


def test_a_killed_server_is_lost_with_its_log(tmp_path):
    with ServerProcess.start(device_slot("cpu", 1), token=TOKEN, log_dir=tmp_path) as doomed:
        waiting, sending = connect(doomed), connect(doomed)
        os.kill(doomed.pid, signal.SIGKILL)
        for _ in range(2):
            with pytest.raises(ServerLostError, match=f"{doomed.address}.*"):
                waiting.request(Ping())
        with pytest.raises(ServerLostError) as caught:
            post_for_ever(sending)
        assert "ready on" in caught.value.log_tail
        deadline = time.monotonic() + 5
        while doomed.alive() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not doomed.alive()
        with pytest.raises(ConnectError, match="ready on"):
            connect(doomed)


@pytest.mark.skipif(shutil.which("openssl") is None, reason="the openssl command is not installed")
def test_tls(tmp_path):
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    command = (
        "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN=localhost"
    )
    names = ["-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1", "-keyout", str(key), "-out", str(cert)]
    subprocess.run([*command.split(), *names], check=True, capture_output=True)
    extra = ["--tls-cert", str(cert), "--tls-key", str(key)]
    with ServerProcess.start(
        device_slot("cpu", 0), token=TOKEN, log_dir=tmp_path, extra_args=extra
    ) as server:
        with Connection.connect(server.address, TOKEN, tls_ca=str(cert)) as c:
            data = np.arange(3 << 20, dtype=np.uint8)
            c.post(Upload(1, TensorSpec("uint8", [len(data)], [1])), [data])
            c.send(Execute("a", fetch=[1]))
            c.send(Execute("b", fetch=[1], inputs=[(2, TensorSpec("uint8", [len(data)], [1]))]), [data])
            assert np.array_equal(c.receive()[1].numpy(), data)
            assert np.array_equal(c.receive()[1].numpy(), data)
            assert isinstance(c.request(Ping())[0], Pong)
        with pytest.raises((ConnectError, ServerLostError, ProtocolError)):
            Connection.connect(server.address, TOKEN, timeout=1)
        with pytest.raises(ConfigError, match="cannot load"):
            Connection.connect(server.address, TOKEN, tls_ca=str(tmp_path / "absent.pem"))
