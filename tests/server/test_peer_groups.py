"""Groups of servers: joining, leaving, members that end, and what torch.distributed is relied on for."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Sequence

import psutil
import pytest
import torch

from genie.devices import device_slot
from genie.errors import OutOfMemoryError, PeerError
from genie.runtime.connection import Connection
from genie.runtime.server_process import ServerProcess
from genie.server import peers
from genie.server.peer_group import PeerGroup, open_store
from genie.wire.messages import (
    Execute,
    Expect,
    Load,
    PeerJoin,
    PeerJoined,
    PeerListen,
    Ping,
    Release,
    Send,
    TensorSpec,
    Upload,
)
from tests.server.peer_sessions import TIMEOUT_S, join, move, pair, servers, start, upload
from tests.server.programs import (
    DEVICE,
    DOUBLE,
    MEMORY_LIMIT,
    TOKEN,
    body,
    connect,
    dense,
    execute,
    fetch,
    floats,
)

__all__ = ["pair", "servers"]


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


def groups_of_this_process(world: int, timeout_s: float = 10.0) -> list[PeerGroup]:
    _store, port = open_store("127.0.0.1")
    listening = [c.laddr for c in psutil.Process().net_connections("tcp") if c.status == "LISTEN"]
    assert ("127.0.0.1", port) in [tuple(a) for a in listening]
    groups: dict[int, PeerGroup] = {}

    def enter(rank: int) -> None:
        message = PeerJoin("127.0.0.1", port, rank, world, timeout_s)
        groups[rank] = PeerGroup(message, "127.0.0.1", torch.device("cpu"))

    threads = [threading.Thread(target=enter, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    bound = {c.laddr[0] for c in psutil.Process().net_connections("tcp") if c.status == "LISTEN"}
    assert bound <= {"127.0.0.1"}
    return [groups[rank] for rank in range(world)]


def test_a_group_of_this_process():
    """The constructors that `PeerGroup` relies on, and that it binds to one interface."""
    a, b = groups_of_this_process(2)
    sent, received = torch.arange(10, dtype=torch.uint8), torch.zeros(10, dtype=torch.uint8)
    into = b.receive(received, 0, b.slot(0, 3, 10, sends=False))
    a.wait(a.send(sent, 1, a.slot(1, 3, 10, sends=True)), 1)
    b.wait(into, 0)
    assert torch.equal(sent, received)
    b.leave()
    with pytest.raises(PeerError):
        a.wait(a.receive(received, 1, 9), 1)
    a.leave()


@pytest.mark.parametrize("gone", [None, 0, 2])
def test_who_leaves_wakes_its_waiters_at_once(gone):
    """Also when another member has gone before, which alone would wake nobody."""
    groups = groups_of_this_process(3, timeout_s=60)
    here = groups[1]
    waited_for = 0 if gone != 0 else 2
    received = torch.zeros(10, dtype=torch.uint8)
    waiting = here.receive(received, waited_for, here.slot(waited_for, 4, 10, sends=False))
    errors: list[Exception] = []

    def wait() -> None:
        try:
            here.wait(waiting, waited_for)
        except PeerError as exc:
            errors.append(exc)

    thread = threading.Thread(target=wait)
    thread.start()
    if gone is not None:
        groups[gone].leave()
        thread.join(0.2)
        assert thread.is_alive()
    here.leave()
    thread.join(5)
    assert not thread.is_alive()
    assert len(errors) == 1
    for group in groups:
        group.leave()


def test_sends_under_way_are_bounded(monkeypatch):
    monkeypatch.setattr(peers, "UNDER_WAY", 1000)
    a, b = groups_of_this_process(2, timeout_s=30)
    sends = peers._UnderWay("sends")
    buffers = [torch.full((400,), k, dtype=torch.uint8) for k in range(3)]
    for buffer in buffers[:2]:
        sends.make_room(400, 5)
        sends.add(a, a.send(buffer, 1, a.slot(1, 7, 400, sends=True)), 1, buffer)
    started = time.monotonic()
    with pytest.raises(PeerError, match="over the bound of 1000"):
        sends.make_room(400, 0.3)
    assert time.monotonic() - started >= 0.3
    received = torch.zeros(400, dtype=torch.uint8)
    b.wait(b.receive(received, 0, b.slot(0, 7, 400, sends=False)), 0)
    sends.make_room(400, 5)  # the oldest is through
    assert sends.bytes_held == 400
    a.leave()
    b.leave()
    sends.end()
    assert sends.bytes_held == 0
    assert sends.bytes_done == 400
    assert not [t for t in threading.enumerate() if t.name == "peer sends"]


@pytest.mark.parametrize(
    ("options", "host"),
    [
        (["--host", "0.0.0.0", "--insecure"], "127.0.0.1"),
        (["--peer-host", "127.0.0.2"], "127.0.0.2"),
        (["--peer-host", "192.0.2.1"], None),
    ],
    ids=["all addresses", "given", "not here"],
)
def test_where_a_group_meets(tmp_path, options, host):
    slot = device_slot(DEVICE, 0)
    with ServerProcess.start(slot, token=TOKEN, log_dir=tmp_path, extra_args=options) as server:
        port = server.address.rpartition(":")[2]
        with Connection.connect(f"127.0.0.1:{port}", TOKEN) as c:
            if host is None:
                with pytest.raises(PeerError, match="--peer-host"):
                    c.request(PeerListen())
                return
            address, _ = c.request(PeerListen())
            assert address.host == host
            assert isinstance(c.request(PeerJoin(host, address.port, 0, 1, 5.0))[0], PeerJoined)
