"""Whatever a peer sends, its own session ends with a typed error and the server lives on."""

from __future__ import annotations

import contextlib
import random
import socket
import struct

import msgspec
import pytest

from genie.errors import AuthError, GenieError, OutOfMemoryError, PeerError, ProtocolError, ServerLostError
from genie.runtime.connection import Connection, parse_address
from genie.wire.framing import HANDSHAKE_HEADER, MAGIC, PRELUDE, Channel
from genie.wire.messages import PROTOCOL_VERSION, Auth, Challenge, Error, Ping, ServerMessage
from tests.server.programs import TOKEN, connect


def dial(server) -> socket.socket:
    return socket.create_connection(parse_address(server.address), 10)


def last_message(sock: socket.socket):
    """The last message before the server closes."""
    channel, last = Channel(sock, ServerMessage), None
    try:
        while True:
            last, _ = channel.receive()
    except OSError:
        return last
    finally:
        sock.close()


def assert_alive(server) -> None:
    with connect(server) as c:
        assert c.request(Ping())


def test_random_bytes_end_with_a_typed_error(server):
    for seed in range(5):
        sock = dial(server)
        sock.sendall(random.Random(seed).randbytes(5000))
        error = last_message(sock)
        assert isinstance(error, Error)
        assert error.error == "ProtocolError"
        assert error.log_tail == ""
    assert_alive(server)


@pytest.mark.parametrize("header", [HANDSHAKE_HEADER + 1, 2**32 - 1])
def test_strangers_cannot_make_the_server_allocate(server, header):
    sock = dial(server)
    sock.sendall(PRELUDE.pack(MAGIC, PROTOCOL_VERSION, 0, header, 0))
    assert "over the limits" in last_message(sock).message
    sock = dial(server)
    sock.sendall(PRELUDE.pack(MAGIC, PROTOCOL_VERSION, 0, 10, 1))
    assert "over the limits" in last_message(sock).message
    assert_alive(server)


def test_another_version_is_told_so(server):
    sock = dial(server)
    channel = Channel(sock, ServerMessage)
    channel.receive()
    channel.send(Auth(PROTOCOL_VERSION + 1, b"", b""))
    assert "install the same version" in last_message(sock).message


def test_requests_before_the_token_are_refused(server):
    sock = dial(server)
    channel = Channel(sock, ServerMessage)
    assert isinstance(channel.receive()[0], Challenge)
    channel.send(Ping())
    assert "starts with Auth" in last_message(sock).message


def test_a_wrong_token_is_refused_without_the_log(server):
    with pytest.raises(AuthError, match="refused the token") as caught:
        Connection.connect(server.address, TOKEN + "!", log_tail=server.log_tail)
    assert caught.value.log_tail == ""
    assert_alive(server)


@pytest.mark.parametrize(
    "data",
    [
        PRELUDE.pack(MAGIC, PROTOCOL_VERSION, 0, 6, 2**63) + b"\x91\xa4Ping",
        PRELUDE.pack(MAGIC, PROTOCOL_VERSION, 0, 2**32 - 1, 0),
        b"\0" * 4096,
    ],
    ids=["payload of 2**63", "header of 2**32", "zeros"],
)
def test_bad_lengths_in_a_session_close_it(server, data):
    with connect(server) as c:
        c._channel._sock.sendall(data)
        c._outstanding += 1
        with pytest.raises(ProtocolError):
            c.receive()
        with pytest.raises(ServerLostError):
            c.request(Ping())
    assert_alive(server)


@pytest.mark.parametrize("cut", [1, 19, 20, 23, 40])
def test_truncated_frames_end_the_session(server, cut):
    with connect(server) as c:
        frame = PRELUDE.pack(MAGIC, PROTOCOL_VERSION, 0, 6, 100) + b"\x91\xa4Ping" + bytes(100)
        c._channel._sock.sendall(frame[:cut])
        c._channel._sock.shutdown(socket.SHUT_WR)
        with pytest.raises(ServerLostError):
            c._receive()
    assert_alive(server)


def junk(rng: random.Random, depth: int = 0):
    """A random msgpack value."""
    leaves = [None, True, -1, 0, 2**63, -(2**63), 1.5, float("nan"), "", "float32", b"", b"\0" * 9]
    if depth > 3 or rng.random() < 0.6:
        return rng.choice(leaves)
    if rng.random() < 0.2:
        return {str(i): junk(rng, depth + 1) for i in range(rng.randrange(3))}
    return [junk(rng, depth + 1) for _ in range(rng.randrange(6))]


def test_headers_of_wrong_types_never_hurt_the_server(server):
    rng = random.Random(0)
    tags = [
        "Auth",
        "Ping",
        "Offer",
        "Upload",
        "Adopt",
        "Release",
        "Execute",
        "Counters",
        "PeerListen",
        "PeerJoin",
        "Expect",
        "Send",
        "Load",
        "Bye",
        "Result",
        "Nothing",
    ]
    for _ in range(150):
        header = msgspec.msgpack.encode([rng.choice(tags), *(junk(rng) for _ in range(rng.randrange(16)))])
        payload = rng.randbytes(rng.choice([0, 0, 5, 64]))
        with connect(server) as c:
            frame = PRELUDE.pack(MAGIC, PROTOCOL_VERSION, 0, len(header), len(payload)) + header + payload
            c._channel._sock.sendall(frame)
            with contextlib.suppress(ProtocolError, ServerLostError, OutOfMemoryError, PeerError):
                c.request(Ping())
    assert_alive(server)


def test_executes_with_plausible_nonsense_never_hurt_the_server(server):
    rng = random.Random(1)
    spec = ["float32", [2], [1], 0, -1]
    with connect(server) as c:
        for _ in range(300):
            code = struct.pack("<6i", *(rng.choice([-2, -1, 0, 1, 2, 2**31 - 1]) for _ in range(6)))
            pattern = [
                rng.choice([["t"], ["i"], ["il", 3], ["tl", 2], ["dt", "x"], ["ol", [1, 0]], ["?"], [], "t"])
            ]
            body = [
                [
                    [
                        0,
                        "aten::" + rng.choice(["add.Tensor", "cat", "zeros", "relu"]),
                        pattern,
                        {},
                        [rng.randrange(-3, 3)],
                    ]
                ]
            ]
            body += [code[: 4 * rng.randrange(7)], rng.randrange(-1, 3), rng.randrange(-1, 3), code[:4]]
            fields = [
                "nonce",
                rng.randrange(3),
                rng.choice([body, None]),
                struct.pack("<5I", *(rng.choice([0, 0, 1, 2, 2**32 - 1]) for _ in range(5)))
                + bytes(4 * rng.randrange(8))
                if rng.random() < 0.8
                else b"",
                rng.choice([0, 0, 1, 31, 32, -1]),
            ]
            fields += [
                rng.choice([0, -(2**63), 2**63 - 1]),
                rng.choice([[], [[1, spec]]]),
                rng.choice([[], [8], [-8]]),
            ]
            fields += [[], [], [], b"", b"", [rng.randrange(3)], rng.random() < 0.5]
            header = msgspec.msgpack.encode(["Execute", *fields])
            payload = bytes(rng.choice([0, 8]))
            c._channel._sock.sendall(
                PRELUDE.pack(MAGIC, PROTOCOL_VERSION, 0, len(header), len(payload)) + header + payload
            )
            c._outstanding += 1
            try:
                c.receive()
            except ServerLostError as exc:
                pytest.fail(str(exc))
            except GenieError:
                assert "unforeseen" not in c.last_error.log_tail
        assert c.request(Ping())
