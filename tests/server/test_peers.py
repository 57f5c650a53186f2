"""Tensors between servers: real processes, raw connections, one session on each."""

from __future__ import annotations

import hashlib
import itertools
import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence

import psutil
import pytest
import torch
from torch import Tensor

from genie.devices import device_slot
from genie.errors import OutOfMemoryError, PeerError, ProtocolError, RemoteError, RemoteOpError
from genie.runtime.connection import Connection
from genie.runtime.server_process import ServerProcess, start_servers
from genie.server.peer_group import PeerGroup, open_store
from genie.wire.messages import (
    Adopt,
    Counters,
    Execute,
    Expect,
    Load,
    Offer,
    PeerAddress,
    PeerJoin,
    PeerJoined,
    PeerListen,
    Ping,
    Release,
    Send,
    TensorSpec,
    Upload,
)
from tests.server.programs import (
    ADD,
    DEVICE,
    DOUBLE,
    MEMORY_LIMIT,
    SCALE_IN_PLACE,
    TOKEN,
    body,
    connect,
    dense,
    execute,
    fetch,
    floats,
    vector,
)

TIMEOUT_S = 20.0
TAGS = itertools.count(1)


def start(tmp_path, count: int) -> list[ServerProcess]:
    return start_servers(
        [device_slot(DEVICE, k) for k in range(count)],
        token=TOKEN,
        log_dir=tmp_path,
        extra_args=["--memory-limit", str(MEMORY_LIMIT)],
    )


@pytest.fixture(scope="module")
def servers(tmp_path_factory) -> Iterator[list[ServerProcess]]:
    processes = start(tmp_path_factory.mktemp("peers"), 3)
    yield processes
    for process in processes:
        assert process.alive(), process.log_tail()
        process.close()


def join(connections: Sequence[Connection], timeout_s: float = TIMEOUT_S) -> None:
    address, _ = connections[0].request(PeerListen())
    assert isinstance(address, PeerAddress)
    for rank, c in enumerate(connections):
        c.send(PeerJoin(address.host, address.port, rank, len(connections), timeout_s))
    for c in connections:
        assert isinstance(c.receive()[0], PeerJoined)


@pytest.fixture
def pair(servers) -> Iterator[list[Connection]]:
    with connect(servers[0]) as a, connect(servers[1]) as b:
        join([a, b])
        yield [a, b]


def upload(c: Connection, handle: int, tensor: Tensor) -> None:
    spec, data = dense(tensor)
    c.post(Upload(handle, spec), [data])


def move(
    connections: Sequence[Connection],
    source: int,
    handle: int,
    target: int,
    new: int,
    like: Tensor,
    **options,
) -> None:
    """Expects first: the receiver may be told before anything is there."""
    spec, _ = dense(like)
    tag = next(TAGS)
    connections[target].post(Expect(new, spec, source, tag, options.pop("digest", None)))
    connections[source].post(Send(handle, spec, target, tag, **options))


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
    digest = hashlib.sha256(data).digest()
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
    move(pair, 0, 1, 1, 2, floats(0), digest=hashlib.sha256(b"another").digest())
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


# -- groups ---------------------------------------------------------------------------------------


def test_a_third_server_joins_later(servers):
    with connect(servers[0]) as a, connect(servers[1]) as b, connect(servers[2]) as c:
        join([a, b])
        upload(a, 1, floats(5))
        move([a, b], 0, 1, 1, 2, floats(0))
        assert fetch(b, 2)[0].item() == 5
        join([a, b, c])
        move([a, b, c], 1, 2, 2, 3, floats(0))
        move([a, b, c], 2, 3, 0, 4, floats(0))
        assert fetch(a, 4)[0].item() == 5


def test_two_sessions_have_groups_of_their_own(servers, pair):
    with connect(servers[1]) as b, connect(servers[0]) as a:
        join([b, a])  # the other way round
        upload(pair[0], 1, floats(1))
        upload(a, 1, floats(2))
        move(pair, 0, 1, 1, 2, floats(0))
        move([b, a], 1, 1, 0, 2, floats(0))
        assert (fetch(pair[1], 2)[0].item(), fetch(b, 2)[0].item()) == (1, 2)
    # The end of one is not the end of the other.
    move(pair, 0, 1, 1, 3, floats(0))
    assert fetch(pair[1], 3)[0].item() == 1


def test_another_session_computes_while_one_waits(servers, pair):
    pair[1].post(Expect(2, TensorSpec("float32", [1], [1]), 0, 5))
    pair[1].send(Execute("waits", fetch=[2]))
    with connect(servers[1]) as other:
        upload(other, 1, floats(1))
        started = time.monotonic()
        other.request(execute(1, DOUBLE, ext=[1], base=5))
        assert time.monotonic() - started < TIMEOUT_S / 2
    upload(pair[0], 1, floats(8))
    pair[0].post(Send(1, TensorSpec("float32", [1], [1]), 1, 5))
    _, payload = pair[1].receive()
    assert payload.view(torch.float32).item() == 8


def test_transfers_without_a_group_say_how_to_get_one(connection):
    connection.post(Expect(2, TensorSpec("float32", [1], [1]), 1, 5))
    with pytest.raises(PeerError, match="PeerJoin"):
        connection.request(Ping())
    with pytest.raises(PeerError, match="PeerJoin"):
        fetch(connection, 2)
    connection.post(Send(1, TensorSpec("float32", [1], [1]), 1, 5))
    with pytest.raises(PeerError, match="PeerJoin"):
        connection.request(Ping())


@pytest.mark.parametrize("other", [-1, 1, 2])
def test_members_that_are_none_are_told(pair, other):
    pair[1].post(Send(1, TensorSpec("float32", [1], [1]), other, 5))
    with pytest.raises(PeerError, match="not another member"):
        pair[1].request(Ping())


def test_joins_that_cannot_be(servers):
    with connect(servers[0]) as a, connect(servers[1]) as b:
        address, _ = a.request(PeerListen())
        started = time.monotonic()
        with pytest.raises(PeerError, match=r"could not join.*within 1 s.*check that all members"):
            b.request(PeerJoin(address.host, address.port, 1, 2, 1.0))
        assert time.monotonic() - started < 10
        with pytest.raises(PeerError, match="PeerListen of its own"):
            b.request(PeerJoin(address.host, address.port, 1, 2, 1.0))
        with pytest.raises(PeerError, match="no place"):
            b.request(PeerJoin(address.host, address.port, 2, 2, 1.0))
        with pytest.raises(PeerError, match=r"could not join"):
            b.request(PeerJoin("127.0.0.1", 1, 0, 2, 1.0))
        join([a, b])


def test_a_transfer_over_the_memory_limit_is_refused_and_the_group_lives_on(pair):
    size = MEMORY_LIMIT // 2 + 1000
    spec = TensorSpec("uint8", [size], [1])
    pair[0].post(Upload(1, spec), [bytes(size)])
    for k in range(2):
        pair[1].post(Expect(10 + k, spec, 0, k))
        pair[0].post(Send(1, spec, 1, k))
    with pytest.raises(OutOfMemoryError):
        pair[1].request(Ping())
    assert fetch(pair[1], 10)[0].numel() == size
    with pytest.raises(OutOfMemoryError):
        fetch(pair[1], 11)
    upload(pair[0], 2, floats(3))
    move(pair, 0, 2, 1, 20, floats(0))
    assert fetch(pair[1], 20)[0].item() == 3


def test_ends_that_disagree_time_out_and_nobody_dies(servers):
    with connect(servers[0]) as a, connect(servers[1]) as b:
        join([a, b], timeout_s=1.0)
        upload(a, 1, torch.ones(1000))
        a.post(Send(1, dense(torch.ones(1000))[0], 1, 5))
        b.post(Expect(2, dense(torch.ones(10))[0], 0, 5))
        with pytest.raises(PeerError, match=r"server 0 of the peer group.*timeout of 1 s"):
            fetch(b, 2)
        # What comes after fails at once, and says so; a new group works.
        started = time.monotonic()
        b.post(Expect(3, dense(torch.ones(10))[0], 0, 6))
        with pytest.raises(PeerError):
            fetch(b, 3)
        assert time.monotonic() - started < 5
        b.request(Ping())  # the failure of `Expect` answered the fetch, and is told once
        with pytest.raises(PeerError):
            fetch(b, 3)
        join([a, b])
        move([a, b], 0, 1, 1, 4, torch.ones(1000))
        assert fetch(b, 4)[0].sum() == 1000


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGSTOP])
def test_a_server_that_ends_in_the_middle(servers, tmp_path, end):
    timeout_s = 2.0
    (doomed,) = start(tmp_path, 1)
    spec = TensorSpec("float32", [1000], [1])
    with doomed, connect(servers[0]) as a, connect(servers[1]) as b, connect(doomed) as c:
        join([a, b, c], timeout_s)
        upload(a, 1, torch.ones(1000))
        a.post(Expect(2, spec, 2, 5))  # it never sends
        a.send(Execute("n", fetch=[2]))
        os.kill(doomed.pid, end)
        started = time.monotonic()
        try:
            with pytest.raises(PeerError, match=r"server 2 of the peer group.*form a new group"):
                a.receive()
            assert time.monotonic() - started < timeout_s + 3
            a.post(Send(1, spec, 2, 6))
            # The failure waits for a request; forming a group is not held up by it.
            join([a, b], TIMEOUT_S)
            with pytest.raises(PeerError):
                a.request(Ping())
            move([a, b], 0, 1, 1, 3, torch.ones(1000))
            assert fetch(b, 3)[0].sum() == 1000
        finally:
            if end == signal.SIGSTOP:
                os.kill(doomed.pid, signal.SIGCONT)


def resources(server: ServerProcess) -> tuple[int, int]:
    process = psutil.Process(server.pid)
    return process.num_threads(), process.num_fds()


def test_groups_leave_nothing_behind(servers):
    def once() -> None:
        with connect(servers[0]) as a, connect(servers[1]) as b:
            join([a, b])
            upload(a, 1, torch.ones(100_000))
            move([a, b], 0, 1, 1, 2, torch.ones(100_000))
            fetch(b, 2)
            # And some that never come to an end.
            b.post(Expect(3, TensorSpec("float32", [1], [1]), 0, 77))
            a.post(Send(1, dense(torch.ones(100_000))[0], 1, 78))
            b.post(Release([3]))
            for c in (a, b):
                c.request(Ping())

    def settled(limit: Sequence[tuple[int, int]] | None) -> list[tuple[int, int]]:
        deadline = time.monotonic() + 15
        while True:
            now = [resources(s) for s in servers[:2]]
            if limit is None and all(n[0] < 40 for n in now):
                return now
            if limit is not None and all(
                n[0] <= m[0] and n[1] <= m[1] for n, m in zip(now, limit, strict=True)
            ):
                return now
            assert time.monotonic() < deadline, (now, limit)
            time.sleep(0.05)

    once()
    time.sleep(1)
    before = settled(None)
    for _ in range(5):
        once()
    settled(before)


def test_load(servers, pair):
    before, _ = pair[0].request(Load())
    upload(pair[0], 1, torch.ones(1000, 1000))
    mm = body(("aten::mm", [["t"], ["t"]], [-1, -1]), n_ext=1, kept=[0])
    pair[0].request(execute(1, mm, ext=[1], base=5))
    with connect(servers[0]) as other:
        after, _ = other.request(Load())
    assert after.sessions == before.sessions + 1
    assert after.held_bytes - before.held_bytes == 8_000_000
    assert 0.001 < after.busy_s - before.busy_s < 60
    assert 0 < after.memory_free < after.memory_total
    started = time.monotonic()
    for _ in range(20):
        pair[0].request(Load())
    assert (time.monotonic() - started) / 20 < 0.05


# -- what is private in torch -----------------------------------------------------------------------


def test_a_group_of_this_process():
    """The constructors that `PeerGroup` relies on, and that it binds to one interface."""
    _store, port = open_store("127.0.0.1")
    listening = [c.laddr for c in psutil.Process().net_connections("tcp") if c.status == "LISTEN"]
    assert ("127.0.0.1", port) in [tuple(a) for a in listening]
    groups: dict[int, PeerGroup] = {}

    def enter(rank: int) -> None:
        message = PeerJoin("127.0.0.1", port, rank, 2, 10.0)
        groups[rank] = PeerGroup(message, "127.0.0.1", torch.device("cpu"))

    threads = [threading.Thread(target=enter, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    a, b = groups[0], groups[1]
    bound = {c.laddr[0] for c in psutil.Process().net_connections("tcp") if c.status == "LISTEN"}
    assert bound <= {"127.0.0.1"}
    sent, received = torch.arange(10, dtype=torch.uint8), torch.zeros(10, dtype=torch.uint8)
    into = b.receive(received, 0, b.slot(0, 3, 10, sends=False))
    a.wait(a.send(sent, 1, a.slot(1, 3, 10, sends=True)), 1)
    b.wait(into, 0)
    assert torch.equal(sent, received)
    waiting = b.receive(received, 0, b.slot(0, 4, 10, sends=False))
    errors: list[Exception] = []

    def wait() -> None:
        try:
            b.wait(waiting, 0)
        except PeerError as exc:
            errors.append(exc)

    thread = threading.Thread(target=wait)
    thread.start()
    b.leave()  # wakes a waiter of the same group at once
    thread.join(5)
    assert not thread.is_alive()
    assert len(errors) == 1
    with pytest.raises(PeerError):
        a.wait(a.receive(received, 1, 9), 1)
    a.leave()
