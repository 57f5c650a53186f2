"""What a profile has seen so far: the client's spans, its programs, and where these ran."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import perf_counter_ns
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from genie.errors import GenieError
from genie.profiling.clocks import OWN, ClockMap, Exchange, shortest
from genie.server.trace import SessionTrace
from genie.wire.messages import Execute, RequestTrace, Trace

if TYPE_CHECKING:
    from genie.frontend.program import Program
    from genie.frontend.session import Session
    from genie.frontend.stream import ProgramStream, Recorded
    from genie.runtime.in_process import InProcessExecutor
    from genie.runtime.link import ServerLink

#: round trips at each end of the profile, of which the shortest tells the server's clock
EXCHANGES = 16
#: how long a profile waits for another thread to leave a session, in seconds
LOCK_SECONDS = 30.0

Interval = tuple[int, int]


@dataclass(slots=True)
class Wait:
    """For one reply, which may tell of several programs: quiet ones have no reply of their own."""

    cause: str
    start: int
    end: int
    nbytes: int
    programs: list[int]


@dataclass(slots=True)
class ProgramTrace:
    """One program on its way: times by this process's `perf_counter_ns`."""

    session: int
    ops: int
    cause: str
    line: str | None
    captured: Interval | None
    place: Place | None = None
    number: int = 0
    sent: Interval | None = None
    nbytes: int = 0  # of the request
    quiet: bool = False
    first_sight: bool = False
    wait: Wait | None = None


@dataclass(slots=True)
class Span:
    track: str
    name: str
    start: int
    end: int
    details: dict[str, Any]


@dataclass
class Place:
    """One session of a server, or this process where a session runs programs in it."""

    process: str
    pid: int | None  # None: this process
    track: str
    client_track: str
    clock: ClockMap = OWN
    sent: int = 0
    requests: list[RequestTrace] = field(default_factory=list)
    op_names: dict[str, list[str]] = field(default_factory=dict)
    dropped: int = 0
    lost: str | None = None  # why nothing could be asked of the server at the end
    synchronized_ops: bool = False

    def take(self, requests: list[RequestTrace], op_names: dict[str, list[str]], dropped: int) -> None:
        self.requests += requests
        self.op_names.update(op_names)
        self.dropped += dropped


class LinkTrace:
    """Follows the programs that go over one link, and asks its server when they ran."""

    def __init__(self, recording: Recording, link: ServerLink, session: int) -> None:
        self._recording, self._link = recording, link
        welcome = link.connection.welcome
        address = link.connection.address
        self.place = Place(
            process=f"server {welcome.device} at {address}",
            pid=welcome.pid,
            track=f"session {welcome.session}",
            client_track=f"session {session}: link to {address}",
            synchronized_ops=recording.ops and welcome.device_type == "cuda",
        )
        self._next: ProgramTrace | None = None
        self._unanswered: list[ProgramTrace] = []
        self._awaited: deque[str] = deque()
        link.trace = self
        try:
            self.place.clock = ClockMap(self._ask(True))
        except (GenieError, RuntimeError) as exc:
            self._lose(exc)

    def _lose(self, exc: Exception) -> None:
        """Lost, closed, or interrupted in the middle of a reply: the rest of the trace is still worth it."""
        self.place.lost = str(exc).splitlines()[0]

    def _ask(self, on: bool) -> Exchange:
        """The shortest of several exchanges; takes what the server has kept so far."""
        exchanges = []
        for left in reversed(range(EXCHANGES)):
            request = Trace(on or left > 0, self._recording.ops, self._recording.limit)
            sent = perf_counter_ns()
            reply = self._link.request_trace(request)
            exchanges.append(Exchange(sent, reply.clock_ns, perf_counter_ns()))
            self.place.take(reply.requests, reply.op_names, reply.dropped)
        return shortest(exchanges)

    def finish(self) -> None:
        """Fetches what the server has kept, and its clock once more. Records why where it cannot."""
        self._link.trace = None
        if self.place.lost is None:
            try:
                self.place.clock = ClockMap(self.place.clock.start, self._ask(False))
            except (GenieError, RuntimeError) as exc:
                self._lose(exc)

    # -- called by the link --------------------------------------------------------------------

    def composed(self, program: Program) -> None:
        """The next request to be sent runs this program."""
        self._next = program.trace

    def sent(self, request: Execute, start: int, nbytes: int) -> None:
        end = perf_counter_ns()
        trace, self._next = self._next, None
        place = self.place
        place.sent += 1
        if not request.quiet:
            self._awaited.append("" if trace is None else trace.cause)
        if trace is not None:
            trace.place, trace.number, trace.sent = place, place.sent, (start, end)
            trace.nbytes, trace.quiet, trace.first_sight = nbytes, request.quiet, request.body is not None
            self._unanswered.append(trace)

    def received(self, start: int, nbytes: int) -> None:
        """A reply is here; it also tells of every quiet program sent before its own."""
        end = perf_counter_ns()
        cause = self._awaited.popleft() if self._awaited else ""
        wait = Wait(cause, start, end, nbytes, [p.number for p in self._unanswered])
        for trace in self._unanswered:
            trace.wait = wait
        self._unanswered = []

    def uploaded(self, start: int, nbytes: int) -> None:
        self._recording.add(
            self.place.client_track, "upload", start, perf_counter_ns(), {"tensor_bytes": nbytes}
        )


class InProcessTrace:
    """As `LinkTrace`, for a session that runs its programs in this process."""

    def __init__(self, recording: Recording, executor: InProcessExecutor, session: int) -> None:
        self._executor = executor
        track = f"session {session}: in-process execution"
        self.place = Place("", None, track, track, synchronized_ops=recording.ops and executor.on_cuda)
        self.server = SessionTrace(recording.ops, recording.limit, executor.synchronize)
        executor.trace = self

    def received(self, program: Program, first_sight: bool) -> None:
        number = self.server.received("", first_sight)
        trace = program.trace
        if trace is not None:
            trace.place, trace.number, trace.first_sight = self.place, number, first_sight

    def finish(self) -> None:
        self._executor.trace = None
        self.place.take(*self.server.take())


class Recording:
    """Everything between the start and the end of one profile.

    ``limit`` bounds the client's spans and programs, and in each server session the requests and op
    times: what is beyond it is counted in ``dropped``, not kept.
    """

    def __init__(self, ops: bool, limit: int) -> None:
        self.ops, self.limit = ops, limit
        self.start = perf_counter_ns()
        self.end = 0
        self.spans: list[Span] = []
        self.programs: list[ProgramTrace] = []
        self.places: list[Place] = []
        self.dropped = 0
        self._kept = 0
        self._lock = threading.Lock()
        self._numbers: WeakKeyDictionary[ProgramStream, int] = WeakKeyDictionary()
        self._open: WeakKeyDictionary[ProgramStream, list[LinkTrace | InProcessTrace]] = WeakKeyDictionary()

    def _room(self) -> bool:
        with self._lock:
            if self._kept >= self.limit:
                self.dropped += 1
                return False
            self._kept += 1
            return True

    def add(self, track: str, name: str, start: int, end: int, details: dict[str, Any]) -> None:
        """A finished span on a track of this process; spans of one track must nest."""
        if self._room():
            self.spans.append(Span(track, name, start, end, details))

    def captured(
        self, stream: ProgramStream, program: Program, sites: Recorded, cause: str
    ) -> ProgramTrace | None:
        """A program is handed over; None when there is no room for it any more."""
        if not self._room():
            return None
        began = int(program.started * 1e9)
        captured = (max(began, self.start), began + int(program.capture_s * 1e9)) if began else None
        line = sites.describe(0) if program.entries else None
        trace = ProgramTrace(self._number(stream), len(program.entries), cause, line, captured)
        self.programs.append(trace)
        return trace

    def _number(self, stream: ProgramStream) -> int:
        with self._lock:
            return self._numbers.setdefault(stream, len(self._numbers) + 1)

    # -- sessions --------------------------------------------------------------------------------

    def opened(self, session: Session) -> None:
        """Follows a session from now on. Raises GenieError when another thread does not let go of it."""
        stream = session.recorder
        with _held(stream):
            if stream.closed is not None or stream in self._open:
                return
            executor: Any = session.executor
            traces: list[LinkTrace | InProcessTrace] = []
            number = self._number(stream)
            traces += [LinkTrace(self, link, number) for link in getattr(executor, "links", ())]
            if hasattr(executor, "trace"):
                traces.append(InProcessTrace(self, executor, number))
            self._open[stream] = traces
            self.places += [t.place for t in traces]

    def closed(self, session: Session) -> None:
        """Takes what the session's servers have kept; called before the session ends, or at the end."""
        stream = session.recorder
        traces = self._open.pop(stream, [])
        try:
            with _held(stream):
                for trace in traces:
                    trace.finish()
        except GenieError as exc:
            for trace in traces:
                trace.place.lost = str(exc)


@contextmanager
def _held(stream: ProgramStream) -> Iterator[None]:
    if not stream.lock.acquire(timeout=LOCK_SECONDS):
        raise GenieError(
            f"another thread has held the session for more than {LOCK_SECONDS:.0f} s, so it cannot be "
            "profiled: take the profile around a shorter request"
        )
    try:
        yield
    finally:
        stream.lock.release()
