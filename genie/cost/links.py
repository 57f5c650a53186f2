"""Round trips and bandwidths, as measured: between the client and a server, and between two servers."""

from __future__ import annotations

import statistics
import time

from genie.runtime.connection import Connection
from genie.scheduler.cluster import Link
from genie.wire.messages import Execute, Expect, Ping, Release, Send, TensorSpec, Upload

#: large enough that the round trip does not count, small enough to take milliseconds
PAYLOAD_BYTES = 4 << 20
ROUND_TRIPS = 15
TRANSFERS = 5


def client_link(connection: Connection) -> Link:
    """The medians of some round trips, empty and with `PAYLOAD_BYTES`. Nothing else may be on its way.

    Raises ServerLostError.
    """
    for _ in range(3):
        connection.request(Ping())
    rtt = statistics.median(_ping_s(connection, b"") for _ in range(ROUND_TRIPS))
    payload = bytes(PAYLOAD_BYTES)
    loaded = statistics.median(_ping_s(connection, payload) for _ in range(TRANSFERS))
    return Link(rtt, PAYLOAD_BYTES / max(loaded - rtt, 1e-9))


def _ping_s(connection: Connection, payload: bytes) -> float:
    start = time.perf_counter()
    connection.request(Ping(), [payload] if payload else [])
    return time.perf_counter() - start


def peer_link(source: Connection, target: Connection, ranks: tuple[int, int] = (0, 1)) -> Link:
    """From one server to another, both in one group (`genie.runtime.peers`) under ``ranks``; handles above
    2**62 are used for it. A round trip is taken as two ways of an element. Raises PeerError, ServerLostError.
    """
    # Each end holds the tensor, and a copy on its way.
    limits = [c.welcome.memory_limit // 4 for c in (source, target) if c.welcome.memory_limit]
    nbytes = max(min([PAYLOAD_BYTES, *limits]), 4096) // 4 * 4
    small, large = (_Transfer(source, target, ranks, n) for n in (1, nbytes // 4))
    for transfer in (small, large):
        transfer.seconds()  # the first one opens the connection
    idle = statistics.median(_ping_s(target, b"") for _ in range(ROUND_TRIPS))
    empty = statistics.median(small.seconds() for _ in range(ROUND_TRIPS))
    loaded = statistics.median(large.seconds() for _ in range(TRANSFERS))
    for transfer in (small, large):
        transfer.close()
    # The client learns of the arrival by a round trip of its own, in which half of the transfer's may hide.
    return Link(2 * max(empty - idle, idle / 10), nbytes / max(loaded - empty, 1e-9))


class _Transfer:
    """One tensor on ``source`` that is sent again and again."""

    _tag = 1 << 30

    def __init__(self, source: Connection, target: Connection, ranks: tuple[int, int], elements: int) -> None:
        self._source, self._target, self._ranks = source, target, ranks
        self._spec = TensorSpec("float32", [elements], [1])
        self._handle = (1 << 62) + elements
        source.post(Upload(self._handle, self._spec), [bytes(4 * elements)])
        source.request(Ping())

    def seconds(self) -> float:
        """Until the client knows that the tensor has arrived."""
        _Transfer._tag += 1
        start = time.perf_counter()
        self._target.post(Expect(self._handle, self._spec, self._ranks[0], self._tag))
        self._source.post(Send(self._handle, self._spec, self._ranks[1], self._tag))
        self._target.request(Execute("link", describe=[self._handle]))  # its use waits for it
        elapsed = time.perf_counter() - start
        self._target.post(Release([self._handle]))
        return elapsed

    def close(self) -> None:
        self._source.post(Release([self._handle]))
