"""What a baseline is: a way to run a workload's requests, and the proof of where they ran."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from genie.gpu_meter import GpuUse
from genie.workloads.protocol import ModelInfo, Request, Response, Workload


@dataclass(frozen=True)
class Receipt:
    """What another process did for a request (the schema's ``receipt``).

    ``ops``, ``programs`` and ``digest`` are None for the peers, which cannot know them.
    ``nonce`` echoes what the client sent with this very request.
    """

    pid: int
    device: str
    nonce: str
    ops: int | None = None
    programs: int | None = None
    digest: str | None = None
    counters: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Wire:
    """Bytes of one request as read from sockets (the schema's ``wire``).

    Client side: ``bytes_out``, ``bytes_in``. ``server_in``/``server_out`` are the other end's own
    counters, None where the peers are counted by the kernel on one side only. ``round_trips`` is
    None for the peers. ``peer_bytes`` moved between servers, as those that sent them counted; ``peer_in``
    as those that received them did (None: not known).
    """

    bytes_out: int = 0
    bytes_in: int = 0
    round_trips: int | None = 0
    peer_bytes: int = 0
    server_in: int | None = None
    server_out: int | None = None
    peer_in: int | None = None


@dataclass(frozen=True)
class PlanSummary:
    """How one window of a request was scheduled: the ``policy`` whose proposal (``label``) was followed, on
    which servers (``pids``), and the milliseconds that it was predicted to take (None: no cost model)."""

    policy: str
    label: str
    why: str
    pids: tuple[int, ...]
    predicted_ms: float | None


@dataclass
class Reply:
    """A response with everything the harness must know to believe it.

    ``phases_ms`` may hold capture, plan, send, remote, fetch (those that apply).
    ``server_cpu_s`` is CPU time spent by the servers on this request.
    ``prove()`` style checks are the harness's work: a baseline only reports.
    """

    response: Response
    receipts: list[Receipt] = field(default_factory=list)
    wire: Wire = field(default_factory=Wire)
    phases_ms: dict[str, float] = field(default_factory=dict)
    server_cpu_s: float = 0.0
    #: where ``response.token_s`` was observed: "client" or "server"
    tokens_observed_at: str = "client"
    #: of the request's windows, in order; empty for baselines that do not schedule
    plans: list[PlanSummary] = field(default_factory=list)


@dataclass
class Setup:
    """One-off costs of ``prepare`` in milliseconds (load, upload, capture: those that apply)."""

    setup_ms: dict[str, float]
    model: ModelInfo
    devices: int


@dataclass(frozen=True)
class Metering:
    """What a request cost the GPUs that it ran on, or one line of ``why`` that is not known."""

    gpus: tuple[GpuUse, ...] = ()
    why: str = ""


@runtime_checkable
class Metered(Protocol):
    """A remote baseline that can ask what the GPUs of its servers were used. Both calls are untimed."""

    def start_meters(self) -> None:
        """Right before ``run``."""

    def read_meters(self) -> Metering:
        """After ``account``, whose bytes must not hold this question."""


class Baseline(Protocol):
    """One way to run a workload. ``prepare`` once, then ``run`` per request, then ``close``.

    ``run`` is the timed call. It returns the finished response at once; counters that cost time
    to collect are fetched by ``account`` after the timer has stopped.
    """

    name: str
    remote: bool

    def prepare(self, workload: Workload) -> Setup: ...

    def run(self, request: Request) -> Response:
        """Timed. Raises a GenieError subclass when it cannot; never runs anything else instead."""

    def account(self) -> Reply:
        """Untimed, right after ``run``: the same response with its receipts and counters."""

    def close(self) -> None:
        """Free what ``prepare`` made (model, session). Servers belong to the fixtures."""
