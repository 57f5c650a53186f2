"""Servers that form a group, with one session on each."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import pytest
import torch
from torch import Tensor

from genie.devices import DeviceSlot, device_slot
from genie.runtime.connection import Connection
from genie.runtime.server_process import ServerProcess, start_servers
from genie.wire.messages import (
    Expect,
    PeerAddress,
    PeerJoin,
    PeerJoined,
    PeerListen,
    Send,
    Upload,
)
from tests.server.programs import (
    DEVICE,
    MEMORY_LIMIT,
    TOKEN,
    connect,
    dense,
)

TIMEOUT_S = 20.0
TAGS = itertools.count(1)


def start(tmp_path, count: int) -> list[ServerProcess]:
    return start_servers(
        [_slot(k) for k in range(count)],
        token=TOKEN,
        log_dir=tmp_path,
        extra_args=["--memory-limit", str(MEMORY_LIMIT)],
    )


def _slot(number: int) -> DeviceSlot:
    if DEVICE == "cuda" and number >= torch.cuda.device_count():
        pytest.skip(f"{number + 1} servers of a group need a GPU each: NCCL refuses two on one")
    return device_slot(DEVICE, number)


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
