"""Tensors that move between this server and others, for one session.

A transfer is one buffer of bytes: the elements, laid out as the spec says, then 16 bytes of trailer (status
and size, int64 LE). The elements come first so that they keep the alignment of the buffer. What could not be
made is sent all the same, with its error in place of the elements: the receiver never waits in vain.
"""

from __future__ import annotations

import contextlib
import logging
import struct
import threading
from collections import deque
from typing import Any

import msgspec
import torch
from torch import Tensor

from genie.errors import GenieError, PeerError, ProtocolError
from genie.server.device import Device
from genie.server.faults import Fault, fault_of
from genie.server.peer_group import PeerGroup, open_store
from genie.server.store import HandleStore
from genie.server.weights import WeightStore
from genie.wire.digest import digest as digest_of
from genie.wire.messages import Expect, PeerAddress, PeerJoin, PeerJoined, Send
from genie.wire.tensors import DTYPES, check_spec, dense_nbytes, over_storage

log = logging.getLogger("genie.server")

TRAILER = struct.Struct("<qq")  # status, then bytes of the elements or of the error
MADE, FAILED = 0, 1
#: bytes of sends that may be under way in a session; and of what arrives though nobody wants it any more
UNDER_WAY = 512 << 20
_IDLE_SECONDS = 5.0
_TEXT = 2000  # characters of an error that travel, at most

# error, message, nonce, instruction: what makes a `Fault`
_Failure = tuple[str, str, str, int]


class Peers:
    """The session's place among other servers. Used by the session's thread only."""

    def __init__(self, device: Device, store: HandleStore, weights: WeightStore, host: str) -> None:
        """``host``: the address that the other servers reach this one by."""
        self._device = device
        self._handles = store
        self._weights = weights
        self._host = host
        self._meeting: Any = None  # the store of the group that is to be formed here
        self._group: PeerGroup | None = None
        self._sends = _UnderWay("sends")
        self._discards = _UnderWay("discards")
        self._received = 0
        self.bytes_out = 0

    # -- groups ----------------------------------------------------------------------------------

    def listen(self) -> PeerAddress:
        """Replaces the meeting point of an earlier call. Raises PeerError."""
        self._meeting, port = open_store(self._host)
        return PeerAddress(self._host, port)

    def join(self, m: PeerJoin) -> PeerJoined:
        """Leaves the group that the session is in. Raises PeerError, and is in no group then."""
        self._leave()
        self._group = PeerGroup(m, self._host, self._device.torch_device)
        log.info("joined a peer group as %d of %d over %s", m.rank, m.world, self._group.backend)
        return PeerJoined(self._group.backend)

    def _leave(self) -> None:
        if self._group is not None:
            self._group.leave()
            self._group = None
        # Handles that still wait for this group stay so; their first use says that it was left.
        self._sends.end()
        self._discards.end()

    def close(self) -> None:
        self._leave()
        self._meeting = None

    def abort(self) -> None:
        """Called by another thread: ends what the session's thread waits for."""
        group = self._group
        if group is not None:
            group.leave()

    def _member(self, other: int) -> PeerGroup:
        if self._group is None:
            raise PeerError("this session is in no group of servers: send PeerJoin to all of them first")
        self._group.check(other)
        return self._group

    # -- sending ---------------------------------------------------------------------------------

    def send(self, m: Send) -> None:
        """Sends the content, or the error that stands in its place. Raises what the receiver is told,
        unless the handle was poisoned before: that was told already."""
        group = self._member(m.target)
        nbytes = dense_nbytes(m.spec)
        slot = group.slot(m.target, m.tag, nbytes, sends=True)
        error: Exception | None = None
        content: Tensor | None = None
        try:
            content = _part(self._handles.get(m.handle), m)
        except (Fault, GenieError, RuntimeError) as exc:
            error = exc
        self._sends.make_room(nbytes + TRAILER.size, group.timeout_s)
        buffer = self._new_buffer(nbytes)
        if content is not None:
            try:
                _elements(buffer, m).copy_(content)
                self._end(buffer, MADE, nbytes)
            except RuntimeError as exc:
                error = exc
        if error is not None:
            text = _encoded(fault_of(error, device=self._device.name), nbytes)
            if text:
                buffer[: len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
            self._end(buffer, FAILED, len(text))
        work = group.send(buffer, m.target, slot)
        self.bytes_out += buffer.numel()
        self._sends.add(group, work, m.target, buffer)
        if error is not None and not self._handles.is_poisoned(m.handle):
            raise error

    def _new_buffer(self, nbytes: int) -> Tensor:
        if self._device.is_cuda:
            return torch.empty(nbytes + TRAILER.size, dtype=torch.uint8, device=self._device.torch_device)
        return self._device.new_payload(nbytes + TRAILER.size)

    def _end(self, buffer: Tensor, status: int, size: int) -> None:
        buffer[-TRAILER.size :] = torch.frombuffer(bytearray(TRAILER.pack(status, size)), dtype=torch.uint8)

    # -- receiving -------------------------------------------------------------------------------

    def expect(self, m: Expect) -> None:
        """Raises what keeps the tensor from being received. It is then received and thrown away, so that
        its sender and the transfers after it are not held up."""
        group = self._member(m.source)
        nbytes = dense_nbytes(m.spec)
        slot = group.slot(m.source, m.tag, nbytes, sends=False)
        refusal: Exception | None = None
        try:
            self._handles.reserve(nbytes)
        except GenieError as exc:
            refusal = exc
            try:
                self._discards.make_room(nbytes, 0.0)
            except PeerError:
                group.leave()
                raise refusal from None
        try:
            buffer = self._new_buffer(nbytes)
        except (RuntimeError, MemoryError):
            group.leave()  # the sender is to know, rather than to wait for its timeout
            raise
        arrival = Arrival(self, m, group, group.receive(buffer, m.source, slot), buffer)
        try:
            if refusal is not None:
                raise refusal
            self._handles.bind_pending(m.handle, arrival)
        except GenieError:
            arrival.abandon()
            raise

    def settle(self) -> None:
        """Waits for all that is to come, so that the counts of the two ends agree."""
        self._handles.settle_all()
        self._discards.wait()

    @property
    def bytes_in(self) -> int:
        return self._received + self._discards.bytes_done

    @property
    def held_bytes(self) -> int:
        """Of buffers that no handle is bound to."""
        return self._sends.bytes_held + self._discards.bytes_held

    def arrived(self, nbytes: int) -> None:
        self._received += nbytes

    def discard(self, group: PeerGroup, work: Any, source: int, buffer: Tensor) -> None:
        self._discards.add(group, work, source, buffer)

    def finish(self, m: Expect, buffer: Tensor) -> Tensor | Fault:
        """The tensor in a buffer that is complete, or the error that came in its place."""
        nbytes = buffer.numel() - TRAILER.size
        status, size = TRAILER.unpack(buffer[nbytes:].cpu().numpy().tobytes())
        if status != MADE:
            text = buffer[: min(max(size, 0), nbytes)].cpu().numpy().tobytes()
            return _decoded(text, m.source)
        if size != nbytes:
            raise ProtocolError(f"server {m.source} sent {size} bytes for {m.spec}, which has {nbytes}")
        dtype = DTYPES[m.spec.dtype]
        if not nbytes:
            return torch.empty_strided(m.spec.shape, m.spec.stride, dtype=dtype, device=buffer.device)
        storage = buffer.untyped_storage()[:nbytes]
        if m.digest is not None:
            if digest_of(buffer[:nbytes].cpu().numpy().data) != m.digest:
                raise ProtocolError(
                    f"what server {m.source} sent for handle {m.handle} does not have the digest expected: "
                    "the content was changed, or another one was meant"
                )
            storage = self._weights.add(m.digest, storage)
        return over_storage(storage, m.spec, dtype)


class Arrival:
    """A tensor on its way here: what a handle is bound to until its first use."""

    def __init__(self, peers: Peers, message: Expect, group: PeerGroup, work: Any, buffer: Tensor) -> None:
        self._peers = peers
        self._message = message
        self._group = group
        self._work = work
        self._buffer = buffer
        self.nbytes = buffer.numel()
        self.shared = message.digest is not None

    def take(self) -> Tensor | Fault:
        """Waits, up to the group's timeout; returns what went wrong rather than raise it."""
        try:
            self._group.wait(self._work, self._message.source)
            self._peers.arrived(self.nbytes)
            return self._peers.finish(self._message, self._buffer)
        except (GenieError, RuntimeError) as exc:
            fault = fault_of(exc)
            log.warning("expected from server %d: %s", self._message.source, fault.message)
            return Fault(*fault.args)

    def abandon(self) -> None:
        """Nobody will use it; its buffer must live until all is here."""
        self._peers.discard(self._group, self._work, self._message.source, self._buffer)


class _UnderWay:
    """Transfers that nobody waits for, and their buffers. A thread, which ends when it has been idle, waits
    for each in turn and lets go of it: gloo cannot be asked whether a transfer is complete."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._transfers: deque[tuple[PeerGroup, Any, int, Tensor]] = deque()
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._ended = False
        self.bytes_held = 0
        self.bytes_done = 0

    def make_room(self, nbytes: int, timeout_s: float) -> None:
        """Waits until ``nbytes`` more are within the bound (or nothing is under way). Raises PeerError."""
        if not self.bytes_held or self.bytes_held + nbytes <= UNDER_WAY:
            return
        with self._changed:
            if not self._changed.wait_for(
                lambda: not self.bytes_held or self.bytes_held + nbytes <= UNDER_WAY, timeout_s
            ):
                raise PeerError(
                    f"{self.bytes_held} bytes between servers have been under way for {timeout_s:g} s, and "
                    f"{nbytes} more would be over the bound of {UNDER_WAY}: their receivers do not take "
                    "them; give a longer timeout, or send less at once"
                )

    def add(self, group: PeerGroup, work: Any, other: int, buffer: Tensor) -> None:
        with self._changed:
            self._ended = False
            self._transfers.append((group, work, other, buffer))
            self.bytes_held += buffer.numel()
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name=f"peer {self._name}", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def wait(self) -> None:
        """Until nothing is under way. Each transfer ends by its group's timeout at the latest."""
        with self._changed:
            while self._transfers:
                self._changed.wait(_IDLE_SECONDS)

    def end(self) -> None:
        """To be called after the group was left: its transfers have ended, and so does the thread."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()
            thread = self._thread
        if thread is not None:
            thread.join(_IDLE_SECONDS)

    def _run(self) -> None:
        torch.set_grad_enabled(False)
        while True:
            with self._changed:
                if not self._transfers and not self._ended:
                    self._changed.wait(_IDLE_SECONDS)
                if not self._transfers:
                    self._thread = None
                    return
                group, work, other, buffer = self._transfers[0]
            nbytes, done = buffer.numel(), False
            if buffer.is_cuda:
                torch.cuda.set_device(buffer.device)  # which GPU is the current one is a thread's own
            try:
                group.wait(work, other)
                done = True
            except PeerError as exc:
                log.warning("%s: %s", self._name, exc)
            del work, buffer, group
            with self._changed:
                self._transfers.popleft()
                self.bytes_held -= nbytes
                self.bytes_done += nbytes if done else 0
                self._changed.notify_all()


def _part(content: Tensor, m: Send) -> Tensor:
    """What is to be sent, as its spec says. Raises ProtocolError when it is not that."""
    if m.narrow is not None:
        dimension, start, length = m.narrow
        if not (0 <= dimension < content.dim() and 0 <= start <= start + length <= content.shape[dimension]):
            raise ProtocolError(
                f"{length} from {start} on in dimension {dimension} is no part of a tensor of shape "
                f"{list(content.shape)}"
            )
        content = content.narrow(dimension, start, length)
    dtype, _ = check_spec(m.spec)
    if list(content.shape) != m.spec.shape or content.dtype != dtype:
        raise ProtocolError(
            f"handle {m.handle} was to be sent as {m.spec.dtype} {m.spec.shape}, but is {content.dtype} "
            f"{list(content.shape)}: send it as it is"
        )
    return content


def _elements(buffer: Tensor, m: Send) -> Tensor:
    dtype = DTYPES[m.spec.dtype]
    if not buffer.numel() - TRAILER.size:
        return torch.empty_strided(m.spec.shape, m.spec.stride, dtype=dtype, device=buffer.device)
    return over_storage(buffer.untyped_storage(), m.spec, dtype)


def _encoded(fault: Fault, room: int) -> bytes:
    """An error in at most ``room`` bytes: whole, or shortened, or nothing."""
    failure: _Failure = (fault.error, fault.message[:_TEXT], fault.nonce, fault.instruction)
    data = msgspec.msgpack.encode(failure)
    if len(data) > room:
        short: _Failure = (
            fault.error,
            fault.message[: max(0, room - 80) // 4],
            fault.nonce,
            fault.instruction,
        )
        data = msgspec.msgpack.encode(short)
    return data if len(data) <= room else b""


def _decoded(data: bytes, source: int) -> Fault:
    with contextlib.suppress(msgspec.MsgspecError):
        error, message, nonce, instruction = msgspec.msgpack.decode(data, type=_Failure)
        return Fault(error, f"server {source} could not make it: {message}", nonce, instruction)
    return Fault(
        "PeerError",
        f"server {source} could not make it, and its error was longer than the tensor: see what that server "
        "answers, and its log",
    )
