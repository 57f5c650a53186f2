"""One server as an executor sees it: which templates, op numbers and contents it has already."""

from __future__ import annotations

import hashlib
import time
from array import array
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from genie.errors import RemoteError
from genie.frontend.entries import definition
from genie.frontend.program import Program
from genie.runtime.connection import Connection
from genie.runtime.progress import UploadProgress
from genie.wire.messages import (
    Adopt,
    Counters,
    CountersReply,
    Execute,
    Offer,
    ProgramReceipt,
    Result,
    Upload,
    Wanted,
)
from genie.wire.tensors import to_wire

MAX_TEMPLATES = 1024
#: parameters from this size on are offered by content, so that a server that has them is not sent them
SHARED_BYTES = 64 << 10


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


class ServerLink:
    """A connection with the client's side of the bookkeeping. Not thread-safe."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.nonce = ""
        self.usage = Usage()
        self.timings = Timings()
        self._templates: OrderedDict[tuple[bytes, bytes], int] = OrderedDict()
        self._next_template = 0
        self._defined: set[int] = set()
        self._evict: list[int] = []
        self._progress = UploadProgress()

    # -- contents --------------------------------------------------------------------------------

    def upload(self, handle: int, tensor: Tensor, is_parameter: bool) -> None:
        """Binds ``handle`` on the server to a dense CPU tensor; sends nothing that it already has."""
        spec, data, owner = to_wire(tensor)
        if is_parameter and owner.nbytes >= SHARED_BYTES:
            digest = hashlib.sha256(data).digest()
            wanted, _ = self.connection.request(Offer([digest], [owner.nbytes]))
            assert isinstance(wanted, Wanted)
            if not wanted.missing:
                self.connection.post(Adopt(handle, spec, digest))
                return
            self.connection.post(Upload(handle, spec, digest), [data])
        else:
            self.connection.post(Upload(handle, spec), [data])
        self._progress.add(owner.nbytes)

    # -- programs --------------------------------------------------------------------------------

    def message(self, program: Program, **options: Any) -> Execute:
        """The request that runs ``program``, with the template's body if the server lacks it."""
        request = Execute(self.nonce, base=program.base, first=program.first, **options)
        if program.entries:
            number = self._templates.get(program.key)
            if number is None:
                new = [t for t in program.tids() if t not in self._defined]
                self._defined.update(new)
                number = self._templates[program.key] = self._next_template
                self._next_template += 1
                request.body = program.body([definition(t) for t in new])
                if len(self._templates) > MAX_TEMPLATES:
                    self._evict.append(self._templates.popitem(last=False)[1])
            else:
                self._templates.move_to_end(program.key)
            request.template = number
            request.literals = array("q", program.literals).tobytes()
            request.floats = array("d", program.floats).tobytes()
            request.ext = array("q", program.ext).tobytes()
            if program.fresh:
                request.checks = program.checks()
        if self._evict:
            request.evict, self._evict = self._evict, []
        return request

    def send(self, request: Execute, buffers: Sequence[Any]) -> None:
        """Sends the request; `receive` gets its reply, unless it is quiet."""
        self._progress.finish()
        start = time.perf_counter()
        if request.quiet:
            self.connection.post(request, buffers)
        else:
            self.connection.send(request, buffers)
        self.timings.send += time.perf_counter() - start

    def receive(self) -> tuple[Result, Tensor]:
        """The reply to the oldest request. Raises the server's error, with ``instruction`` set."""
        start = time.perf_counter()
        try:
            reply, payload = self.connection.receive()
        except RemoteError as exc:
            last = self.connection.last_error
            exc.instruction = last.instruction if last is not None else -1  # type: ignore[attr-defined]
            raise
        waited = time.perf_counter() - start
        # Quiet programs ran while the client recorded; only the awaited one's execution is in the wait.
        self.timings.fetch += max(0.0, waited - reply.receipt.remote_ms * 1e-3)
        self._book([*reply.earlier, reply.receipt])
        return reply, payload

    def _book(self, receipts: list[ProgramReceipt]) -> None:
        for receipt in receipts:
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

    def traffic(self) -> tuple[int, int, int, int, int]:
        """Since `begin`: client bytes out and in, round trips, and the server's own bytes in and out."""
        connection = self.connection
        out0, in0, trips0 = self._start
        out, into, trips = connection.bytes_out, connection.bytes_in, connection.round_trips
        reply, _ = connection.request(Counters())
        assert isinstance(reply, CountersReply)
        # Programs after the last read have had no reply; they belong to this account, not to the next.
        self._book(reply.earlier)
        # Both ends have counted the same so far (each account checks it), so the difference is the request's.
        return out - out0, into - in0, trips - trips0, reply.bytes_in - out0, reply.bytes_out - in0

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


def int64s(values: list[int]) -> bytes:
    return array("q", values).tobytes() if values else b""
