"""The link alone: an empty round trip and an upload through a connection, each beside a raw socket.

Ours and the raw one take turns, request by request, and take turns at being first, so that both see
the same machine and the same caches. The raw peer is a process of its own on the cores of the
server. Nothing fails on a ratio; a run fails when the counters of the two ends disagree, or when
fewer bytes crossed than the requests hold.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass
from statistics import median, median_low
from typing import Any

import torch

from genie.baselines.protocol import Wire
from genie.bench import clock
from genie.bench.oracle import LeastBytes, check_bytes
from genie.bench.placement import client_cores, placed
from genie.bench.pool import ServerPool
from genie.bench.raw_socket import RawPeer
from genie.bench.receipts import check_both_ends
from genie.bench.schema import SCHEMA_VERSION
from genie.bench.session import BenchSession
from genie.errors import VerificationError
from genie.runtime.connection import Connection, fetched_tensors
from genie.wire.framing import PRELUDE
from genie.wire.messages import (
    Counters,
    CountersReply,
    Execute,
    Ping,
    Release,
    Result,
    TensorSpec,
    Upload,
)

WORKLOAD = "link"
BASELINE = "genie_local_remote"
UPLOAD_BYTES = 64 * 2**20
#: (timed, untimed before them): enough for a median that a busy machine does not move
PING_ROUNDS = (500, 50)
UPLOAD_ROUNDS = (12, 2)
_HANDLE = 1


@dataclass
class _Request:
    """One timed request; ``cpu_s`` of this whole process, as for the cells."""

    seconds: float
    cpu_s: float
    bytes_out: int
    bytes_in: int


class LinkBench:
    """Fixture ``genie_link``. ``row`` is filled for the summary."""

    def __init__(self, session: BenchSession, pool: ServerPool, row: dict[str, Any]) -> None:
        self._session = session
        self._pool = pool
        self._row = row
        self._cores = client_cores(session.local_slot, remote=True)

    def empty_round_trip(self, benchmark: Any) -> dict[str, Any]:
        """Ping and Pong, beside as many raw bytes there and back. Returns the ``extra_info``."""
        _begin(benchmark, "empty round trip")
        with self._placed(), self._connect() as connection:
            out, into = connection.bytes_out, connection.bytes_in
            connection.request(Ping())
            out, into = connection.bytes_out - out, connection.bytes_in - into
            with closing(RawPeer(out, into, self._session.local_slot.cores)) as raw:
                frame = bytes(out)
                run = _SideBySide(connection, lambda: connection.request(Ping()), raw, frame)
                run.measure(benchmark, *PING_ROUNDS)
                run.check(least_out=PRELUDE.size, least_in=PRELUDE.size, where="empty round trip")
        verified = {"ok": True, "kind": "counters", "max_abs_err": None}
        return self._record(benchmark, "empty round trip", run, verified, payload=0)

    def upload_64mib(self, benchmark: Any) -> dict[str, Any]:
        """An Upload of 64 MiB and a Ping, beside the same bytes sent raw and acknowledged by one byte."""
        _begin(benchmark, "upload 64 MiB")
        content = torch.empty(UPLOAD_BYTES, dtype=torch.uint8)
        content.random_(generator=torch.Generator().manual_seed(0))
        data = content.numpy().data
        spec = TensorSpec("uint8", [UPLOAD_BYTES], [1])
        with self._placed(), self._connect() as connection:

            def upload() -> None:
                connection.post(Upload(_HANDLE, spec), [data])
                connection.request(Ping())

            def release() -> None:
                connection.post(Release([_HANDLE]))
                connection.request(Ping())

            with closing(RawPeer(UPLOAD_BYTES, 1, self._session.local_slot.cores)) as raw:
                run = _SideBySide(connection, upload, raw, data, reset=release)
                run.measure(benchmark, *UPLOAD_ROUNDS)
                result, payload = connection.request(Execute("link", fetch=[_HANDLE]))
                assert isinstance(result, Result)
                if not torch.equal(fetched_tensors(result, payload)[0], content):
                    raise VerificationError("upload 64 MiB: the server holds other bytes than were uploaded")
                run.check(least_out=UPLOAD_BYTES, least_in=PRELUDE.size, where="upload 64 MiB")
        verified = {"ok": True, "kind": "allclose", "max_abs_err": 0.0}
        return self._record(benchmark, "upload 64 MiB", run, verified, payload=UPLOAD_BYTES)

    def _placed(self) -> AbstractContextManager[None]:
        return nullcontext() if self._session.parallel else placed(self._cores)

    def _connect(self) -> Connection:
        pool = self._pool
        address = pool.require(1)[0]
        return Connection.connect(address, pool.token, log_tail=lambda: pool.log_tails().get(address, ""))

    def _record(
        self, benchmark: Any, case: str, run: _SideBySide, verified: dict[str, Any], payload: int
    ) -> dict[str, Any]:
        """Stores the keys that every result has, and ``link``; ratios only where rounds were timed."""
        timed = benchmark.enabled
        ours, raw = run.ours_s(), median(run.raw_s)
        wire = run.wire_per_request()
        link: dict[str, Any] = {
            "case": case,
            "median_s": ours if timed else None,
            "raw_median_s": raw if timed else None,
            "time_ratio": ours / raw if timed else None,
            "raw_bytes_out": run.raw_bytes[0],
            "raw_bytes_in": run.raw_bytes[1],
            "payload_bytes": payload,
        }
        if payload:
            link |= {
                "bytes_per_s": payload / ours if timed else None,
                "raw_bytes_per_s": payload / raw if timed else None,
                "throughput_ratio": raw / ours if timed else None,
            }
        info = {
            "schema_version": SCHEMA_VERSION,
            "baseline": BASELINE,
            "workload": WORKLOAD,
            "profile": self._session.profile,
            "params": {"case": case},
            "features": [],
            "ablated": [],
            "fingerprint": self._session.fingerprint(BASELINE, remote=True),
            "model": {"name": WORKLOAD, "params": 0, "dtype": "uint8"},
            "setup_ms": {},
            "verified": verified,
            "wire": wire,
            "receipt": {**run.server, "ops": None, "programs": None, "digest": None},
            "phases_ms": {},
            "llm": None,
            "weights": {"source": None, "sha256": None},
            "devices": 1,
            "cpu_s": {"client": median(one.cpu_s for one in run.requests), "server": run.server_cpu_s},
            "client_cores": list(self._cores),
            "rounds": len(run.requests),
            "warmup": run.warmups,
            "cases": None,
            "ratio_to_local": None,
            "link": {**link, "raw_s": run.raw_s},
        }
        benchmark.extra_info.update(info)
        benchmark.has_error = False
        self._row |= link | {"rounds": len(run.requests) if timed else 0}
        return info


def _begin(benchmark: Any, case: str) -> None:
    """Nothing is saved unless it is cleared; the group must stand before the first round."""
    benchmark.has_error = True
    benchmark.group = f"{WORKLOAD}: {case}"


class _SideBySide:
    """Requests through a connection and a raw socket in turns; ``reset`` comes before each of ours."""

    def __init__(
        self,
        connection: Connection,
        ours: Callable[[], object],
        raw: RawPeer,
        data: bytes | memoryview,
        reset: Callable[[], None] | None = None,
    ) -> None:
        self._connection = connection
        self._ours = ours
        self._raw = raw
        self._data = data
        self._reset = reset
        self.requests: list[_Request] = []
        self.raw_s: list[float] = []
        self.raw_bytes = (len(data), 0)
        self.warmups = 0
        self.server = {"pid": connection.welcome.pid, "device": connection.welcome.device}
        self.server_cpu_s = 0.0

    def measure(self, benchmark: Any, rounds: int, warmups: int) -> None:
        """One of ours and a raw one each round; only ours run on the clock of pytest-benchmark."""
        if benchmark.enabled:
            self.warmups = warmups
            for _ in range(warmups):
                self._turn()
            self.requests, self.raw_s = [], []
        before = self._counters().cpu_s
        benchmark.pedantic(self._turn, rounds=rounds, iterations=1)
        self.server_cpu_s = (self._counters().cpu_s - before) / max(1, len(self.requests))

    def _turn(self) -> None:
        pair = [self._raw_request, self._request]
        for request in pair if len(self.requests) % 2 else reversed(pair):
            request()

    def _request(self) -> None:
        if self._reset is not None:
            self._reset()
        connection = self._connection
        out, into = connection.bytes_out, connection.bytes_in
        cpu = time.process_time()
        start = time.perf_counter()
        self._ours()
        seconds = time.perf_counter() - start
        cpu = time.process_time() - cpu
        clock.count(seconds)
        self.requests.append(_Request(seconds, cpu, connection.bytes_out - out, connection.bytes_in - into))

    def _raw_request(self) -> None:
        start = time.perf_counter()
        self._raw.exchange(self._data)
        self.raw_s.append(time.perf_counter() - start)

    def ours_s(self) -> float:
        return median(one.seconds for one in self.requests)

    def wire_per_request(self) -> dict[str, Any]:
        return {
            "bytes_out": median_low(one.bytes_out for one in self.requests),
            "bytes_in": median_low(one.bytes_in for one in self.requests),
            "round_trips": 1,
            "peer_bytes": 0,
        }

    def check(self, *, least_out: int, least_in: int, where: str) -> None:
        """Raises WireCountError unless both ends of both links counted the same, and enough."""
        for one in self.requests:
            wire = Wire(bytes_out=one.bytes_out, bytes_in=one.bytes_in, round_trips=1)
            check_bytes(wire, LeastBytes(least_out, least_in), where)
        connection, raw = self._connection, self._raw
        # The server's figures are as they stood before the question, and so must ours be.
        out, into = connection.bytes_out, connection.bytes_in
        counters = self._counters()
        ends = Wire(out, into, server_in=counters.bytes_in, server_out=counters.bytes_out)
        check_both_ends(ends, exact=True, where=where)
        server_in, server_out = raw.finish()
        ends = Wire(raw.bytes_out, raw.bytes_in, server_in=server_in, server_out=server_out)
        check_both_ends(ends, exact=True, where=f"{where}, raw socket")
        exchanges = self.warmups + len(self.raw_s)
        self.raw_bytes = (raw.bytes_out // exchanges, raw.bytes_in // exchanges)

    def _counters(self) -> CountersReply:
        reply, _ = self._connection.request(Counters())
        assert isinstance(reply, CountersReply)
        return reply
