"""Tensors between servers: real processes, raw connections, one session on each."""

from __future__ import annotations

import pytest
import torch

from genie.errors import PeerError, ProtocolError, RemoteError, RemoteOpError
from genie.runtime.connection import Connection
from genie.wire.digest import digest as digest_of
from genie.wire.messages import (
    Adopt,
    Counters,
    Execute,
    Expect,
    Load,
    Offer,
    Ping,
    Release,
    Send,
    TensorSpec,
    Upload,
)
from tests.server.peer_sessions import join, move, pair, servers, upload
from tests.server.programs import (
    ADD,
    DOUBLE,
    SCALE_IN_PLACE,
    body,
    connect,
    dense,
    execute,
    fetch,
    floats,
    vector,
)

__all__ = ["pair", "servers"]


def peer_bytes(c: Connection) -> tuple[int, int]:
    reply, _ = c.request(Counters())
    return reply.peer_in, reply.peer_out


LAYOUTS = {
    "contiguous": torch.arange(24.0).reshape(2, 3, 4),
    "channels_last": torch.arange(2 * 3 * 4 * 5.0).reshape(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "transposed": torch.arange(12.0).reshape(3, 4).t(),
    "no elements": torch.empty(3, 0, 2),
    "0-dim": torch.tensor(7.5),
    "bool": torch.tensor([True, False, True]),
    "bfloat16": torch.randn(5, 7).bfloat16(),
    "int64": torch.arange(-3, 3),
    "complex": torch.randn(3, dtype=torch.complex64),
    "large": torch.arange(1_000_000),
}


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize(("source", "target"), [(0, 1), (1, 0)])
def test_content_and_layout_arrive(pair, name, source, target):
    tensor = LAYOUTS[name]
    upload(pair[source], 1, tensor)
    move(pair, source, 1, target, 2, tensor)
    result, _ = pair[target].request(Execute("n", fetch=[2], describe=[2]))
    assert result.described[0].stride == list(tensor.stride())
    assert result.described[0].offset == 0
    (there,) = fetch(pair[target], 2)
    assert there.dtype == tensor.dtype
    assert torch.equal(there, tensor)


def test_a_layout_other_than_the_sender_has_is_made_on_the_way(pair):
    tensor = torch.arange(12.0).reshape(3, 4)
    upload(pair[0], 1, tensor)
    move(pair, 0, 1, 1, 2, tensor.t().contiguous().t())
    result, _ = pair[1].request(Execute("n", describe=[2]))
    assert result.described[0].stride == [1, 3]
    assert torch.equal(fetch(pair[1], 2)[0], tensor)


def test_a_part_is_sent(pair):
    tensor = torch.arange(24.0).reshape(4, 6)
    upload(pair[0], 1, tensor)
    move(pair, 0, 1, 1, 2, tensor[:, 2:5].contiguous(), narrow=(1, 2, 3))
    assert torch.equal(fetch(pair[1], 2)[0], tensor[:, 2:5])


def test_what_is_sent_is_the_content_at_that_time(pair):
    upload(pair[0], 1, floats(1, 2))
    move(pair, 0, 1, 1, 2, floats(0, 0))
    pair[0].request(execute(1, SCALE_IN_PLACE, ext=[1], literals=[100]))
    move(pair, 0, 1, 1, 3, floats(0, 0))
    assert fetch(pair[1], 2)[0].tolist() == [1, 2]
    assert fetch(pair[1], 3)[0].tolist() == [100, 200]


def test_transfers_both_ways_interleaved_with_programs(pair):
    """Ping-pong of a value that each side doubles; nothing is fetched before the end."""
    upload(pair[0], 100, floats(1))
    for c in pair:
        c.request(execute(1, DOUBLE, ext=[100]) if c is pair[0] else Ping())
    pair[1].post(execute(1, DOUBLE, ext=[100], quiet=True, nonce="defines"))  # fails: is told below
    with pytest.raises(ProtocolError):
        pair[1].request(Ping())
    handle = 100
    for k in range(20):
        here, there = k % 2, 1 - k % 2
        pair[here].post(execute(1, ext=[handle], base=handle + 1, quiet=True))
        move(pair, here, handle + 1, there, handle + 2, floats(0))
        handle += 2
    assert fetch(pair[0], handle)[0].item() == 2.0**20


def test_both_directions_at_once(pair):
    """Large enough that neither end could take it all before it gives its own."""
    size = 4 << 20
    specs = TensorSpec("uint8", [size], [1])
    for c in pair:
        c.post(Upload(1, specs), [bytes([7]) * size])
    for k in range(2, 5):
        move(pair, 0, 1, 1, k, torch.empty(size, dtype=torch.uint8))
        move(pair, 1, 1, 0, k, torch.empty(size, dtype=torch.uint8))
    for c in pair:
        assert all(bool((t == 7).all()) for t in fetch(c, 2, 3, 4))


def test_both_ends_count_the_same_bytes(pair):
    upload(pair[0], 1, floats(1, 2, 3))
    for k in range(3):
        move(pair, 0, 1, 1, 2 + k, floats(0, 0, 0))
    move(pair, 1, 2, 0, 9, floats(0, 0, 0))
    pair[1].post(Release([3]))  # never used: counted all the same
    assert peer_bytes(pair[1]) == (3 * 28, 28)
    assert peer_bytes(pair[0]) == (28, 3 * 28)


def test_a_poisoned_handle_sends_its_error(pair):
    bad = body(("aten::mm", [["t"], ["t"]], [-1, -2]), n_ext=2, kept=[0])
    upload(pair[0], 1, torch.ones(2, 3))
    with pytest.raises(RemoteOpError):
        pair[0].request(execute(1, bad, ext=[1, 1], base=10, nonce="origin"))
    move(pair, 0, 10, 1, 2, torch.empty(500))
    with pytest.raises(RemoteOpError, match="server 0 could not make it: aten::mm") as caught:
        fetch(pair[1], 2)
    assert "aten::mm" in str(caught.value)
    assert (pair[1].last_error.nonce, pair[1].last_error.instruction) == ("origin", 0)
    # It was told where it happened: the sender's session goes on.
    pair[0].request(Ping())
    # And where there is no room for the error, one is told at least that there is one.
    move(pair, 0, 10, 1, 3, floats(0))
    with pytest.raises(PeerError, match="server 0 could not make it"):
        fetch(pair[1], 3)


def test_an_error_travels_on_through_a_third_server(servers):
    with connect(servers[0]) as a, connect(servers[1]) as b, connect(servers[2]) as c:
        join([a, b, c])
        move([a, b, c], 0, 10, 1, 2, torch.empty(500))  # there is no handle 10
        move([a, b, c], 1, 2, 2, 3, torch.empty(500))
        with pytest.raises(ProtocolError, match="server 1 could not make it: server 0 could not make it"):
            fetch(c, 3)
        with pytest.raises(ProtocolError, match="handle 10 is not bound"):
            a.request(Ping())
        b.request(Ping())


@pytest.mark.parametrize(
    ("like", "narrow"),
    [(floats(0, 0), None), (torch.zeros(3, dtype=torch.int32), None), (floats(0, 0), (0, 2, 2))],
    ids=["shape", "dtype", "narrow"],
)
def test_a_wrong_spec_is_told_to_both_ends(pair, like, narrow):
    upload(pair[0], 1, floats(1, 2, 3))
    move(pair, 0, 1, 1, 2, like, narrow=narrow)
    with pytest.raises(ProtocolError):
        pair[0].request(Ping())
    with pytest.raises(RemoteError, match="server 0 could not make it"):
        fetch(pair[1], 2)
    move(pair, 0, 1, 1, 3, floats(0, 0, 0))
    assert fetch(pair[1], 3)[0].tolist() == [1, 2, 3]


def test_shared_content_arrives_with_its_digest(servers, pair):
    tensor = torch.randn(70_000)
    spec, data = dense(tensor)
    digest = digest_of(data)
    pair[0].post(Upload(1, spec, digest), [data])
    move(pair, 0, 1, 1, 2, tensor, digest=digest)
    pair[1].request(Execute("n", describe=[2]))
    with connect(servers[1]) as other:
        assert other.request(Offer([digest], [len(data)]))[0].missing == []
        other.post(Adopt(5, spec, digest))
        assert torch.equal(fetch(other, 5)[0], tensor)
        # Read-only: who writes gets a copy.
        pair[1].request(execute(1, SCALE_IN_PLACE, ext=[2], literals=[2]))
        assert torch.equal(fetch(other, 5)[0], tensor)
        assert torch.equal(fetch(pair[1], 2)[0], tensor * 2)
        # One content, held twice, counts once.
        assert other.request(Load())[0].held_bytes < 2.5 * len(data)


def test_content_of_another_digest_is_refused(pair):
    upload(pair[0], 1, floats(1))
    move(pair, 0, 1, 1, 2, floats(0), digest=digest_of(b"another"))
    with pytest.raises(ProtocolError, match="digest"):
        fetch(pair[1], 2)


def test_handles_freed_while_pending(pair):
    size = 1 << 20
    spec = TensorSpec("uint8", [size], [1])
    for k in range(5):
        pair[1].post(Expect(10 + k, spec, 0, k))
    pair[1].post(Release([10, 12, 14]))
    pair[1].post(Upload(11, TensorSpec("uint8", [1], [1])), [b"x"])  # bound anew while pending
    pair[0].post(Upload(1, spec), [b"\x05" * size])
    for k in range(5):
        pair[0].post(Send(1, spec, 1, k))
    assert fetch(pair[1], 11)[0].tolist() == [ord("x")]
    assert bool((fetch(pair[1], 13)[0] == 5).all())
    reply, _ = pair[1].request(Counters())
    assert reply.peer_in == 5 * (size + 16)
    assert reply.handles == 2
    assert reply.held_bytes == size + 1


def test_names_bind_kept_values(pair):
    program = body(ADD, ("aten::add.Tensor", [["t"], ["t"]], [0, 0]), n_ext=1, kept=[0, 1])
    named = type(program)(program.defs, program.code, 1, 2, program.kept, [], False, vector("i", 7, 3))
    upload(pair[0], 1, floats(1))
    pair[0].request(execute(1, named, ext=[1], base=100))
    assert [t.item() for t in fetch(pair[0], 107, 103)] == [2, 4]
    with pytest.raises(RemoteError):
        pair[0].request(execute(1, ext=[999], base=200))
    for handle in (207, 203):
        with pytest.raises(ProtocolError, match="handle 999"):
            fetch(pair[0], handle)


@pytest.mark.parametrize("names", [[1], [1, 1], [-1, 0], [1, 2, 3]])
def test_bad_names_are_refused(connection, names):
    program = body(ADD, ("aten::add.Tensor", [["t"], ["t"]], [0, 0]), n_ext=1, kept=[0, 1])
    named = type(program)(program.defs, program.code, 1, 2, program.kept, [], False, vector("i", *names))
    upload(connection, 1, floats(1))
    with pytest.raises(ProtocolError, match="name of its own"):
        connection.request(execute(1, named, ext=[1]))
