"""One server as an executor sees it: which templates, op numbers and contents it has already."""

from __future__ import annotations

import time
from array import array
from collections import OrderedDict
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from genie.config import ENGINES, MAX_RUN_AHEAD
from genie.errors import ConfigError, RemoteError
from genie.frontend.entries import definition
from genie.frontend.program import Program
from genie.profiling.recording import LinkTrace
from genie.runtime.connection import Connection
from genie.runtime.progress import UploadProgress
from genie.wire import ahead
from genie.wire.ahead import SHARED_BYTES
from genie.wire.digest import digest as digest_of
from genie.wire.messages import (
    MAX_LANES,
    Adopt,
    BriefReceipt,
    Configure,
    Counters,
    CountersReply,
    Execute,
    GpuReading,
    Offer,
    Ping,
    ProgramReceipt,
    ReadGpu,
    Result,
    Trace,
    TraceReply,
    Upload,
    Wanted,
)
from genie.wire.receipts import Completer
from genie.wire.tensors import to_wire
from genie.wire.vectors import Predictor, Vectors

MAX_TEMPLATES = 1024


@dataclass
class Timings:
    """Seconds spent on one request, by phase."""

    capture: float = 0.0
    send: float = 0.0
    remote: float = 0.0
    fetch: float = 0.0


@dataclass
class Usage:
    """What one request did on one server, as its receipts say."""

    receipts: list[ProgramReceipt] = field(default_factory=list)
    cpu_s: float = 0.0


class _Template:
    """A template that the server has. It is used in a lane of its own at each of its places between
    two replies, so that equal layers do not spoil each other's predictions."""

    __slots__ = ("lanes", "number", "reply", "uses")

    def __init__(self, number: int) -> None:
        self.number = number
        self.lanes: list[Predictor] = []
        self.uses = 0  # since the reply ``reply``
        self.reply = -1

    def next_lane(self, reply: int) -> int:
        if reply != self.reply:
            self.reply, self.uses = reply, 0
        lane = self.uses % MAX_LANES
        self.uses += 1
        if lane == len(self.lanes):
            self.lanes.append(Predictor())
        return lane


class ServerLink:
    """A connection with the client's side of the bookkeeping. Not thread-safe.

    The server keeps the ``max_templates`` templates used last, or fewer if it holds no more itself.
    """

    def __init__(self, connection: Connection, max_templates: int = MAX_TEMPLATES) -> None:
        if max_templates < 1:
            raise ConfigError(f"max_templates={max_templates}: a program needs one template at least")
        self.connection = connection
        self.nonce = ""
        self.usage = Usage()
        self.timings = Timings()
        self.trace: LinkTrace | None = None  # while a profile is taken
        self.max_templates = min(max_templates, connection.welcome.max_templates)
        self._templates: OrderedDict[tuple[bytes, bytes], _Template] = OrderedDict()
        self._next_template = 0
        self._defined: set[int] = set()
        self._evict: list[int] = []
        self._asked = self._replies = 0  # requests that are answered, and their replies so far
        self._receipts = Completer(connection.welcome.pid, connection.welcome.device)
        self._progress = UploadProgress()
        #: whether the server has contents that were offered together and whose turn is still to come
        self._offered: dict[bytes, bool] = {}
        self._peers = (0, 0)
        self._configured = Configure([], 0)

    def configure(self, engines: Collection[str] = (), run_ahead: int = 0) -> None:
        """Programs sent from now on may run with ``engines`` (of `genie.config.ENGINES`) beside op by op, and
        up to ``run_ahead`` windows before they are asked for. Raises ConfigError for what there is not."""
        unknown = sorted(set(engines) - set(ENGINES))
        if unknown:
            raise ConfigError(f"there is no engine {', '.join(unknown)}: choose from {', '.join(ENGINES)}")
        if not 0 <= run_ahead <= MAX_RUN_AHEAD:
            raise ConfigError(f"run_ahead={run_ahead}: a server runs 0 to {MAX_RUN_AHEAD} windows ahead")
        asked = Configure(sorted(engines), run_ahead)
        if asked != self._configured:
            self.connection.post(asked)
            self._configured = asked

    # -- contents --------------------------------------------------------------------------------

    def upload(self, handle: int, tensor: Tensor, is_parameter: bool) -> bytes | None:
        """Binds ``handle`` on the server to a dense CPU tensor; sends nothing that it already has.

        The content is that at the time of the call. Returns its digest where the server shares it between
        sessions (parameters of `SHARED_BYTES` and more).
        """
        start = time.perf_counter_ns()
        digest = self._upload(handle, tensor, is_parameter)
        if self.trace is not None:
            self.trace.uploaded(start, tensor.nbytes)
        return digest

    def _upload(self, handle: int, tensor: Tensor, is_parameter: bool) -> bytes | None:
        spec, data, owner = to_wire(tensor)
        if is_parameter and owner.nbytes >= SHARED_BYTES:
            digest = ahead.take(owner) or digest_of(data, owner)
            if self._has(digest, owner.nbytes):
                self.connection.post(Adopt(handle, spec, digest))
                return digest
            self.connection.post(Upload(handle, spec, digest), [data])
        else:
            digest = None
            self.connection.post(Upload(handle, spec), [data])
        self._progress.add(owner.nbytes)
        return digest

    def _has(self, digest: bytes, nbytes: int) -> bool:
        """Asks the server, for this content and for those that are announced and hashed already."""
        known = self._offered.pop(digest, None)
        if known is None:
            offer = {digest: nbytes, **dict(ahead.ready())}
            wanted, _ = self.connection.request(Offer(list(offer), list(offer.values())))
            assert isinstance(wanted, Wanted)
            missing = set(wanted.missing)
            self._offered = {d: i not in missing for i, d in enumerate(offer)}
            known = self._offered.pop(digest)
        return known

    def digest(self, tensor: Tensor) -> tuple[bytes, int]:
        """Digest and bytes of a dense CPU tensor's content."""
        _, data, owner = to_wire(tensor)
        return digest_of(data, owner), owner.nbytes

    def settle(self) -> None:
        """Waits until all that was sent is done. Raises what failed since the last reply, with
        ``instruction`` set."""
        try:
            self.connection.request(Ping())
        except RemoteError as exc:
            self._note_instruction(exc)
            raise

    def _note_instruction(self, exc: RemoteError) -> None:
        last = self.connection.last_error
        exc.instruction = last.instruction if last is not None else -1  # type: ignore[attr-defined]

    # -- programs --------------------------------------------------------------------------------

    def message(self, program: Program, releases: Sequence[int] = (), **options: Any) -> Execute:
        """The request that runs ``program`` and then frees the handles ``releases``, with the template's
        body if the server lacks it. `send` must follow: the server is to see what it was told here.
        Raises OverflowError for an int of over 64 bits."""
        request = Execute(self.nonce, base=program.base, first=program.first, **options)
        if program.entries:
            vectors = Vectors(program.literals, program.floats, program.ext, releases)
            key = program.template
            template = self._templates.get(key)
            if template is None:
                template = _Template(self._next_template)
                request.vectors = self._encode(template, request, vectors)
                self._define(program, key, template, request)
            else:
                request.vectors = self._encode(template, request, vectors)
                self._templates.move_to_end(key)
            request.template = template.number
            if program.fresh:
                request.checks = program.checks()
        else:
            request.release_after = int64s(releases)
        if self._evict:
            request.evict, self._evict = self._evict, []
            for number in request.evict:
                self._receipts.evict(number, self._asked + 1)
        if self.trace is not None:
            self.trace.composed(program)
        return request

    def _encode(self, template: _Template, request: Execute, vectors: Vectors) -> bytes:
        request.lane = template.next_lane(self._asked)
        return template.lanes[request.lane].encode(vectors, request.base)

    def _define(
        self, program: Program, key: tuple[bytes, bytes], template: _Template, request: Execute
    ) -> None:
        new = [t for t in program.tids() if t not in self._defined]
        request.body = program.body([definition(t) for t in new])
        self._defined.update(new)
        self._templates[key] = template
        self._next_template += 1
        if len(self._templates) > self.max_templates:
            self._evict.append(self._templates.popitem(last=False)[1].number)

    def _undo(self, request: Execute) -> None:
        """The request did not leave: what the server was to remember of it is sent anew."""
        for key, template in self._templates.items():
            if template.number == request.template:
                del self._templates[key]
                self._evict.append(template.number)
                break
        self._evict += request.evict
        if request.body is not None:
            self._defined.difference_update(d.tid for d in request.body.defs)

    def send(self, request: Execute, buffers: Sequence[Any]) -> None:
        """Sends the request; `receive` gets its reply, unless it is quiet."""
        self._progress.finish()
        connection = self.connection
        start, before = time.perf_counter_ns(), connection.bytes_accepted
        try:
            if request.quiet:
                connection.post(request, buffers)
            else:
                connection.send(request, buffers)
                self._asked += 1
        except BaseException:
            if connection.bytes_accepted == before:
                self._undo(request)
            raise
        self.timings.send += (time.perf_counter_ns() - start) * 1e-9
        if self.trace is not None:
            self.trace.sent(request, start, connection.bytes_accepted - before)

    def receive(self) -> tuple[Result, Tensor]:
        """The reply to the oldest request. Raises the server's error, with ``instruction`` set."""
        start, before = time.perf_counter_ns(), self.connection.bytes_in
        try:
            reply, payload = self.connection.receive()
        except RemoteError as exc:
            self._note_instruction(exc)
            raise
        finally:
            self._replies += 1
            if self.trace is not None:
                self.trace.received(start, self.connection.bytes_in - before)
        waited = (time.perf_counter_ns() - start) * 1e-9
        # Quiet programs ran while the client recorded; only the awaited one's execution is in the wait.
        self.timings.fetch += max(0.0, waited - reply.receipt.remote_ms * 1e-3)
        self._book(reply.earlier, reply.receipt.nonce)
        self._book_one(reply.receipt)
        self._receipts.replied(self._replies)
        return reply, payload

    def _book(self, earlier: list[BriefReceipt], nonce: str = "") -> None:
        for receipt in self._receipts.complete(earlier, nonce):
            self._book_one(receipt)

    def _book_one(self, receipt: ProgramReceipt) -> None:
        self.timings.remote += receipt.remote_ms * 1e-3
        self.usage.receipts.append(receipt)
        self.usage.cpu_s += receipt.cpu_s

    # -- accounts --------------------------------------------------------------------------------

    def begin(self, nonce: str) -> None:
        """Starts a new account: programs sent from now on carry ``nonce``."""
        self.nonce = nonce
        self.usage, self.timings = Usage(), Timings()
        connection = self.connection
        self._start = (connection.bytes_out, connection.bytes_in, connection.round_trips)
        #: bytes of tensors that this server received from others and sent to others, in the last account
        self.peer_bytes = (0, 0)

    def traffic(self) -> tuple[int, int, int, int, int]:
        """Since `begin`: client bytes out and in, round trips, and the server's own bytes in and out."""
        connection = self.connection
        out0, in0, trips0 = self._start
        out, into, trips = connection.bytes_out, connection.bytes_in, connection.round_trips
        # Programs after the last read have had no reply; they belong to this account, not to the next.
        reply = self.counters()
        before, self._peers = self._peers, (reply.peer_in, reply.peer_out)
        self.peer_bytes = (reply.peer_in - before[0], reply.peer_out - before[1])
        # Both ends have counted the same so far (each account checks it), so the difference is the request's.
        return out - out0, into - in0, trips - trips0, reply.bytes_in - out0, reply.bytes_out - in0

    def counters(self) -> CountersReply:
        """What the server counted of this session, when all that was sent is done and all tensors from other
        servers are there. Raises ServerLostError."""
        reply, _ = self.connection.request(Counters())
        assert isinstance(reply, CountersReply)
        self._book(reply.earlier)
        return reply

    def read_gpu(self, start: bool = False) -> GpuReading:
        """What the server's GPU was used since the last reading with ``start``. Raises ServerLostError."""
        reply, _ = self.connection.request(ReadGpu(start))
        assert isinstance(reply, GpuReading)
        return reply

    def request_trace(self, request: Trace) -> TraceReply:
        """What the server remembers of this session's programs. Raises ServerLostError."""
        reply, _ = self.connection.request(request)
        assert isinstance(reply, TraceReply)
        self._book(reply.earlier)
        return reply

    def close(self) -> None:
        self._progress.finish()
        self.connection.close()


def inline_inputs(program: Program) -> tuple[list, list, list[Tensor]]:
    """(handle, spec) pairs, payload buffers and their owners of the host tensors in a program."""
    inputs, buffers, owners = [], [], []
    for handle, tensor in program.inputs:
        spec, data, owner = to_wire(tensor)
        inputs.append((handle, spec))
        buffers.append(data)
        owners.append(owner)
    return inputs, buffers, owners


def int64s(values: Sequence[int]) -> bytes:
    return array("q", values).tobytes() if values else b""
