"""What both peers share: hand-split requests, one call per request and device, and the accounting."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from genie.baselines.peer_worker import Done, Failed, Loaded
from genie.baselines.protocol import Reply, Setup, Wire
from genie.baselines.tcp_counters import Snapshot, moved, settled
from genie.devices import DeviceSlot
from genie.errors import MeasurementError, OutOfMemoryError, RemoteOpError, SessionClosedError, WireCountError
from genie.workloads.protocol import Request, Response, Workload

Result = TypeVar("Result")


@dataclass(frozen=True)
class Link:
    """The processes at the two ends whose TCP connections are the wire: see each pool for who is where."""

    client_pids: tuple[int, ...]
    server_pids: tuple[int, ...]


class PeerPool(Protocol):
    """Workers, one per device, each with one ``ResidentModel``."""

    devices: list[DeviceSlot]

    def start(self) -> None:
        """Start the workers unless they run. Raises ConnectError, or ServerLostError after a loss."""

    def alive(self) -> bool: ...

    def call(self, method: str, arguments: Sequence[tuple[object, ...]], timeout_s: float) -> list[object]:
        """Call ``method`` of the first ``len(arguments)`` workers at the same time, and gather.

        Raises ServerLostError when a worker dies or is silent for ``timeout_s``; the pool is then
        not alive any more.
        """

    def link(self) -> Link: ...

    def log_tail(self) -> str: ...

    def restart(self) -> None: ...

    def close(self) -> None: ...


class PeerBaseline:
    """A workload over a ``PeerPool``: the ``Baseline`` protocol for the peers.

    ``account`` must follow every ``run``: the bytes of a request are those since the last account
    (or since ``prepare`` or ``mark``), so that no counter is read inside the timer.
    """

    remote = True

    def __init__(
        self, name: str, pool: PeerPool, load_timeout_s: float = 300.0, run_timeout_s: float = 120.0
    ) -> None:
        self.name = name
        self._pool = pool
        self._load_timeout_s = load_timeout_s
        self._run_timeout_s = run_timeout_s
        self._workload: Workload | None = None
        self._workers = 0
        self._before: Snapshot = {}
        self._runs = 0
        self._done: list[Done] = []
        self._response: Response | None = None

    def prepare(self, workload: Workload) -> Setup:
        """Start the pool unless it runs, and put the workload's model into the workers that it uses.

        Raises MeasurementError when two workers built different models, RemoteOpError when building
        it raised in a worker, ServerLostError when the pool has lost a worker.
        """
        self._pool.start()
        self._forget()
        self._workers = _workers(workload, len(self._pool.devices))
        raw = self._pool.call("load", [(workload,)] * self._workers, self._load_timeout_s)
        loaded = [self._checked(one, Loaded) for one in raw]
        if len({one.info for one in loaded}) != 1:
            raise MeasurementError(
                f"the workers of {self.name} built different models ({[one.info for one in loaded]}): "
                "the workload's seeding or checkpoint differs between processes"
            )
        self._workload = workload
        self.mark()
        return Setup({"load": max(one.load_ms for one in loaded)}, loaded[0].info, self._workers)

    def mark(self) -> None:
        """Count bytes from here on (untimed): leaves out what crossed the link since the last account."""
        link = self._pool.link()
        self._before = settled(link.client_pids, link.server_pids)
        self._runs = 0

    def run(self, request: Request) -> Response:
        """Timed: split by hand, one asynchronous call per device, gather, merge."""
        workload = self._workload
        if workload is None:
            raise SessionClosedError(f"{self.name} was asked to run before prepare(), or after close()")
        self._runs += 1
        parts = workload.split(request, self._workers) if self._workers > 1 else [request]
        nonces = [secrets.token_hex(8) for _ in parts]
        raw = self._pool.call("run", list(zip(parts, nonces, strict=True)), self._run_timeout_s)
        self._done = [self._checked(one, Done) for one in raw]
        # A receipt that answers another call is a stale or mixed-up result, whatever it holds.
        if [one.receipt.nonce for one in self._done] != nonces:
            raise MeasurementError(f"{self.name} returned another request's result: restart its pool")
        responses = [one.response for one in self._done]
        self._response = workload.merge(responses) if len(responses) > 1 else responses[0]
        return self._response

    def account(self) -> Reply:
        """Untimed: the response of the one ``run`` since the last account, its receipts and bytes.

        Raises WireCountError when ``run`` was called more than once since, or a connection closed.
        """
        if self._response is None:
            raise SessionClosedError(f"{self.name} has no response to account for: call run() first")
        if self._runs != 1:
            raise WireCountError(
                f"{self.name} ran {self._runs} requests since its bytes were last read: call account() after "
                "every run(), or mark() before the run that counts"
            )
        link = self._pool.link()
        after = settled(link.client_pids, link.server_pids)
        total = moved(self._before, after)
        reply = Reply(
            response=self._response,
            receipts=[one.receipt for one in self._done],
            wire=Wire(
                bytes_out=total.client_out,
                bytes_in=total.client_in,
                round_trips=None,
                server_in=total.server_in,
                server_out=total.server_out,
            ),
            phases_ms={"remote": max(one.remote_ms for one in self._done)},
            server_cpu_s=sum(one.cpu_s for one in self._done),
            tokens_observed_at="server",
        )
        self._before, self._runs = after, 0
        self._response, self._done = None, []
        return reply

    def close(self) -> None:
        """Free the workers' models; the pool itself stays up."""
        if self._workload is not None and self._pool.alive():
            self._pool.call("unload", [()] * self._workers, self._load_timeout_s)
        self._forget()

    def _forget(self) -> None:
        self._workload = self._response = None
        self._done = []

    def _checked(self, raw: object, expected: type[Result]) -> Result:
        if isinstance(raw, Failed):
            error = OutOfMemoryError if raw.out_of_memory else RemoteOpError
            raise error(f"{self.name}'s worker raised {raw.message}", raw.trace)
        if not isinstance(raw, expected):
            raise MeasurementError(f"{self.name} returned a {type(raw).__name__}, not a {expected.__name__}")
        return raw


def _workers(workload: Workload, devices: int) -> int:
    """How many workers one request of ``workload`` keeps busy, over all its cases."""
    if not workload.splittable or devices == 1:
        return 1
    return max(len(workload.split(workload.request(0, case), devices)) for case in workload.cases)
