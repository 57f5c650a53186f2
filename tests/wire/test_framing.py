"""Frames: what goes in comes out, over any cut of the stream, and bad bytes are told as such."""

from __future__ import annotations

import socket
import threading
import time

import numpy as np
import pytest

from genie.errors import ProtocolError
from genie.wire.framing import MAGIC, MAX_HEADER, PRELUDE, Channel, PeerClosedError, offsets
from genie.wire.messages import PROTOCOL_VERSION, ClientMessage, Ping, Pong, Release, ServerMessage


@pytest.fixture
def pair():
    a, b = socket.socketpair()
    for sock in (a, b):
        sock.settimeout(10)
    yield Channel(a, ServerMessage), Channel(b, ClientMessage)
    a.close()
    b.close()


def raw(pair, data: bytes) -> Channel:
    pair[0]._sock.sendall(data)
    return pair[1]


def prelude(magic=MAGIC, version=PROTOCOL_VERSION, reserved=0, header=0, payload=0) -> bytes:
    return PRELUDE.pack(magic, version, reserved, header, payload)


def test_pieces_arrive_at_the_offsets_that_both_ends_compute(pair):
    client, server = pair
    pieces = [np.full(n, n % 251, np.uint8) for n in (3, 64, 0, 100_000, 1)]
    sender = threading.Thread(target=client.send, args=(Ping(), pieces))
    sender.start()
    message, payload = server.receive()
    sender.join()
    starts, end = offsets([len(p) for p in pieces])
    assert message == Ping()
    assert payload.numel() == end
    for start, piece in zip(starts, pieces, strict=True):
        assert start % 64 == 0 or not len(piece)
        assert np.array_equal(payload.numpy()[start : start + len(piece)], piece)


def test_both_ends_count_the_same_bytes(pair):
    client, server = pair
    client.send(Ping(), [b"abc"])
    client.send(Release(list(range(1000))))
    server.receive()
    first = server.bytes_in
    server.receive()
    assert server.frame_start == first
    assert client.bytes_out == server.bytes_in
    server.send(Pong())
    client.receive()
    assert server.bytes_out == client.bytes_in


def test_a_stream_cut_anywhere_is_put_together_again(pair):
    client, server = pair
    client.send(Release([1, 2, 3]))
    client.send(Ping(), [b"0123456789" * 10])
    stream = server._sock.recv(4096)
    sender = threading.Thread(
        target=lambda: [(client._sock.send(stream[i : i + 1]), time.sleep(0)) for i in range(len(stream))]
    )
    sender.start()
    assert server.receive()[0] == Release([1, 2, 3])
    assert bytes(server.receive()[1].numpy()) == b"0123456789" * 10
    sender.join()


def test_headers_longer_than_the_read_buffer_arrive_and_short_ones_after_them(pair):
    client, server = pair
    sender = threading.Thread(
        target=lambda: [client.send(Release(list(range(n)))) for n in (100_000, 3, 20_000, 1)]
    )
    sender.start()
    assert [len(server.receive()[0].handles) for _ in range(4)] == [100_000, 3, 20_000, 1]
    sender.join()


def test_many_small_pieces_exceed_one_system_call(pair):
    client, server = pair
    sender = threading.Thread(target=client.send, args=(Ping(), [bytes([i % 256]) for i in range(3000)]))
    sender.start()
    _, payload = server.receive()
    sender.join()
    assert payload[::64].tolist() == [i % 256 for i in range(3000)]


def test_a_refused_payload_is_dropped_and_the_stream_stays_in_step(pair):
    client, server = pair
    sender = threading.Thread(
        target=lambda: [client.send(Ping(), [bytes(3_000_000)]), client.send(Release([7]))]
    )
    sender.start()
    asked = []
    assert server.receive(lambda m, n: asked.append(n))[1].numel() == 0
    assert server.receive()[0] == Release([7])
    assert asked == [3_000_000]
    sender.join()


def test_two_ends_that_send_large_frames_do_not_wait_for_each_other(pair):
    client, server = pair
    large = bytes(8 << 20)
    got = []
    server_thread = threading.Thread(target=lambda: [server.send(Pong(), [large]), server.receive()])
    server_thread.start()
    client.send(Ping(), [large], lambda: got.append(client.receive()[1].numel()))
    server_thread.join(10)
    assert not server_thread.is_alive()
    assert got == [len(large)]


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"GET / HTTP/1.1\r\n\r\n\r\n\r\n", "bad magic"),
        (prelude(version=99), "version 99"),
        (prelude(reserved=1), "bad magic"),
        (prelude(header=MAX_HEADER + 1), "over the limits"),
        (prelude(header=1, payload=2**63), "over the limits"),
        (prelude(header=3) + b"\xc1\xc1\xc1", "malformed"),
        (prelude(header=1) + b"\x93", "malformed"),
        (prelude(header=5) + b"\x92\xa3Foo", "malformed"),
    ],
    ids=lambda v: None if isinstance(v, bytes) else v,
)
def test_bytes_that_are_no_frame_are_a_protocol_error(pair, data, text):
    with pytest.raises(ProtocolError, match=text):
        raw(pair, data).receive()


@pytest.mark.parametrize("data", [b"", b"GN", prelude(header=10), prelude(header=10) + b"\x91"])
def test_a_truncated_frame_is_told_from_a_clean_end(pair, data):
    server = raw(pair, data)
    pair[0].close()
    with pytest.raises(PeerClosedError) as caught:
        server.receive()
    assert caught.value.clean == (data == b"")


def test_nothing_is_allocated_for_a_payload_over_the_limit(pair):
    with pytest.raises(ProtocolError, match="over the limits"):
        raw(pair, prelude(header=6, payload=100) + b"\x91\xa4Ping").receive(
            lambda *_: pytest.fail("asked"), max_payload=99
        )
