"""Frames over a stream socket: a fixed prelude, a msgspec header, then raw payload bytes.

    prelude   magic "GNIE" | version u16 | zero u16 | header length u32 | payload length u64   (20 bytes, LE)
    header    one msgpack-encoded message of genie.wire.messages
    payload   pieces in order; each starts at the next multiple of 64 bytes (an empty one takes no room)

Both ends compute the pieces' offsets from their sizes, so no table of offsets travels.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import ssl
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Generic, Protocol, TypeVar

import msgspec
import torch
from torch import Tensor

from genie.errors import ProtocolError
from genie.wire.backlog import Backlog
from genie.wire.buffers import new_payload
from genie.wire.messages import PROTOCOL_VERSION

MAGIC = b"GNIE"
PRELUDE = struct.Struct("<4sHHIQ")
ALIGNMENT = 64
MAX_HEADER = 64 << 20
MAX_PAYLOAD = 1 << 40
HANDSHAKE_HEADER = 4096  # a peer that has not proved the token may not make us allocate more

_READ_BUFFER = 64 << 10
_SCRATCH = 1 << 20
_IOV_MAX = min(os.sysconf("SC_IOV_MAX"), 1024) if os.sysconf("SC_IOV_MAX") > 0 else 16
_ZEROS = bytes(ALIGNMENT)
EMPTY = torch.empty(0, dtype=torch.uint8)

M = TypeVar("M")
Buffer = Any  # whatever supports the buffer protocol with one byte per item


class Sink(Protocol):
    """Takes a payload piece by piece."""

    def pieces(self) -> Iterator[memoryview]:
        """Writable memory for all bytes of the payload, in order. Each piece is full when the next is asked
        for, or the iterator ends; if the stream breaks, it is asked for no more."""


class PeerClosedError(ConnectionError):
    """The peer closed the stream. ``clean`` when it did so between two frames."""

    def __init__(self, clean: bool) -> None:
        self.clean = clean
        super().__init__("the peer closed the connection" + ("" if clean else " in the middle of a frame"))


def offsets(sizes: Sequence[int]) -> tuple[list[int], int]:
    """Where each piece of a payload starts, and the payload's length, all in bytes."""
    starts, end = [], 0
    for size in sizes:
        start = -(-end // ALIGNMENT) * ALIGNMENT if size else end
        starts.append(start)
        end = start + size
    return starts, end


class Channel(Generic[M]):
    """One end of a framed stream; not thread-safe.

    ``bytes_in``/``bytes_out`` count every byte of every frame handed over so far, as the socket
    calls returned them (under TLS: before encryption). Any OSError or ProtocolError leaves the
    stream out of step: close the channel.
    """

    def __init__(self, sock: socket.socket, incoming: Any, max_header: int = MAX_HEADER) -> None:
        self._sock = sock
        self._decoder: msgspec.msgpack.Decoder[M] = msgspec.msgpack.Decoder(incoming)
        self._encode_into = msgspec.msgpack.Encoder().encode_into
        self._tls = isinstance(sock, ssl.SSLSocket)
        self._flags = 0 if self._tls else socket.MSG_WAITALL
        self.max_header = max_header
        self._out = bytearray(256)
        self._buffer = bytearray(_READ_BUFFER)
        self._view = memoryview(self._buffer)
        self._start = self._end = 0  # bytes received but not consumed yet
        self._received = 0
        self._scratch: memoryview | None = None
        self._sent = 0
        self._backlog: Backlog | None = None
        self._poll: select.poll | None = None
        self.frame_start = 0  # bytes_in before the frame that `receive` returned last

    @property
    def bytes_in(self) -> int:
        return self._received - (self._end - self._start)

    @property
    def bytes_out(self) -> int:
        return self._sent if self._backlog is None else self._backlog.sent

    @property
    def bytes_accepted(self) -> int:
        """``bytes_out``, and what waits in the backlog."""
        return self._sent if self._backlog is None else self._backlog.accepted

    # -- sending -----------------------------------------------------------------------------

    def send_later(self, limit: int) -> None:
        """From now on `send` does not wait for the peer: up to ``limit`` bytes are copied and sent by a
        thread. Under TLS it goes on as before, for an SSL object serves one thread at a time."""
        if not self._tls:
            self._backlog = Backlog(self._sock, limit, self._sent)

    def settle(self, drain: Callable[[], None] | None = None, timeout_s: float | None = None) -> bool:
        """Waits until all that was sent is with the socket; see `Backlog.settle`."""
        return self._backlog is None or self._backlog.settle(drain, timeout_s)

    def send(
        self, message: Any, buffers: Sequence[Buffer] = (), drain: Callable[[], None] | None = None
    ) -> None:
        """Sends one frame. ``drain`` is called whenever the peer has sent something before this frame
        is out, and must receive it: else two ends that both send large frames would wait for ever."""
        out = self._out
        self._encode_into(message, out, PRELUDE.size)
        header = len(out) - PRELUDE.size
        if header > MAX_HEADER:
            raise ProtocolError(
                f"a header of {header} bytes is over the limit of {MAX_HEADER}: split the request"
            )
        if not buffers:
            PRELUDE.pack_into(out, 0, MAGIC, PROTOCOL_VERSION, 0, header, 0)
            if self._backlog is not None:
                sent = self._backlog.send_now(out)
            else:
                sent = self._sock.send(out) if drain is None else 0
                self._sent += sent
            if sent != len(out):
                self._send_pieces([memoryview(out)[sent:]], drain)
            return
        pieces: list[memoryview] = []
        end = 0
        for buffer in buffers:
            view = memoryview(buffer)
            if view.nbytes == 0:
                continue
            padding = -end % ALIGNMENT
            if padding:
                pieces.append(memoryview(_ZEROS)[:padding])
            pieces.append(view if view.ndim == 1 and view.itemsize == 1 else view.cast("B"))
            end += padding + view.nbytes
        PRELUDE.pack_into(out, 0, MAGIC, PROTOCOL_VERSION, 0, header, end)
        self._send_pieces([memoryview(out), *pieces], drain)

    def _send_pieces(self, pieces: list[memoryview], drain: Callable[[], None] | None) -> None:
        try:
            if self._backlog is not None:
                self._backlog.send(pieces, drain)
                return
            if isinstance(self._sock, ssl.SSLSocket):
                for piece in pieces:
                    self._sock.sendall(piece)
                    self._sent += len(piece)
                return
            flags = 0 if drain is None else socket.MSG_DONTWAIT
            first = 0
            while first < len(pieces):
                if drain is not None:
                    readable, writable, _ = select.select([self._sock], [self._sock], [])
                    if readable:
                        drain()
                    if not writable:
                        continue
                try:
                    sent = self._sock.sendmsg(pieces[first : first + _IOV_MAX], (), flags)
                except BlockingIOError:
                    continue
                self._sent += sent
                while first < len(pieces) and sent >= len(pieces[first]):
                    sent -= len(pieces[first])
                    first += 1
                if sent:
                    pieces[first] = pieces[first][sent:]
        finally:
            # The header's bytearray cannot be reused while a view of it is alive.
            pieces.clear()

    # -- receiving ---------------------------------------------------------------------------

    def receive(
        self, allocate: Callable[[M, int], Tensor | Sink | None] | None = None, max_payload: int = MAX_PAYLOAD
    ) -> tuple[M, Any]:
        """The next message and its payload (uint8, on the CPU, in a storage of its own).

        ``allocate(message, nbytes)`` is asked before the payload is read, and only when there is one. It may
        give a `Sink`, which is filled and returned in the payload's place; None means that the payload is
        read and dropped (an empty one is returned).
        Raises PeerClosedError, OSError, or ProtocolError for bytes that are no valid frame.
        """
        self.frame_start = self._received - (self._end - self._start)
        if self._end - self._start < PRELUDE.size:
            self._fill(PRELUDE.size)
        start = self._start
        magic, version, reserved, header, payload = PRELUDE.unpack_from(self._buffer, start)
        if magic != MAGIC or reserved:
            raise ProtocolError(
                "the peer does not speak Genie's protocol (bad magic): check the address and port"
            )
        if version != PROTOCOL_VERSION:
            raise ProtocolError(
                f"the peer speaks protocol version {version}, this end {PROTOCOL_VERSION}: "
                "install the same version of Genie on both"
            )
        if header > self.max_header or payload > max_payload:
            raise ProtocolError(
                f"a frame with a header of {header} and a payload of {payload} bytes is over the limits "
                f"({self.max_header} and {max_payload}): send less at once"
            )
        size = PRELUDE.size + header
        if self._end - start < size:
            if size > len(self._buffer) and size > _READ_BUFFER:
                message = self._decode(self._long_header(header))
            else:
                self._fill(size)
                start = self._start
                message = self._decode(self._view[start + PRELUDE.size : start + size])
                self._start = start + size
        else:
            message = self._decode(self._view[start + PRELUDE.size : start + size])
            self._start = start + size
        if not payload:
            return message, EMPTY
        target = new_payload(payload) if allocate is None else allocate(message, payload)
        if target is None:
            self._drop(payload)
            return message, EMPTY
        if isinstance(target, Tensor):
            self._read_into(target.numpy().data)
        else:
            for piece in target.pieces():
                self._read_into(piece)
        return message, target

    def has_more(self, timeout_s: float = 0.0) -> bool:
        """Whether something is here to be received, or comes within the time: a frame, a part of one, or the
        end of the stream."""
        if self._end > self._start or (isinstance(self._sock, ssl.SSLSocket) and self._sock.pending()):
            return True
        if self._poll is None:
            self._poll = select.poll()
            self._poll.register(self._sock, select.POLLIN)
        return bool(self._poll.poll(timeout_s * 1e3))

    def _decode(self, header: memoryview | bytearray) -> M:
        try:
            return self._decoder.decode(header)
        except msgspec.MsgspecError as exc:
            raise ProtocolError(f"malformed message: {exc}") from exc

    def _fill(self, need: int) -> None:
        """Receives until ``need`` unconsumed bytes are in the buffer."""
        if self._start == self._end:
            self._start = self._end = 0
        elif self._start + need > _READ_BUFFER:
            left = self._end - self._start
            self._buffer[:left] = self._buffer[self._start : self._end]
            self._start, self._end = 0, left
        while self._end - self._start < need:
            n = self._sock.recv_into(self._view[self._end :] if self._end else self._buffer)
            if not n:
                raise PeerClosedError(clean=self._end == self._start)
            self._end += n
            self._received += n

    def _long_header(self, header: int) -> bytearray:
        target = bytearray(header)
        self._start += PRELUDE.size
        self._read_into(memoryview(target))
        return target

    def _read_into(self, target: memoryview) -> None:
        at = min(self._end - self._start, len(target))
        if at:
            target[:at] = self._view[self._start : self._start + at]
            self._start += at
        while at < len(target):
            n = self._sock.recv_into(target[at:], 0, self._flags)
            if not n:
                raise PeerClosedError(clean=False)
            self._received += n
            at += n

    def _drop(self, nbytes: int) -> None:
        if self._scratch is None:
            self._scratch = memoryview(bytearray(_SCRATCH))
        while nbytes:
            part = min(nbytes, _SCRATCH)
            self._read_into(self._scratch[:part])
            nbytes -= part

    # -- the socket --------------------------------------------------------------------------

    def settimeout(self, seconds: float | None) -> None:
        self._sock.settimeout(seconds)

    def abort(self) -> None:
        """Wakes a thread that waits in this channel, and makes every later call fail."""
        with contextlib.suppress(OSError):  # closed already: nothing is left to wake
            self._sock.shutdown(socket.SHUT_RDWR)

    def linger(self) -> None:
        """Ends the sending side and reads what the peer still sends, until it closes or the timeout."""
        self._sock.shutdown(socket.SHUT_WR)
        deadline = time.monotonic() + (self._sock.gettimeout() or 0.0)
        while time.monotonic() < deadline and self._sock.recv_into(self._buffer):
            continue

    def close(self) -> None:
        if self._backlog is not None:
            self._backlog.close()
        self._sock.close()


def tune(sock: socket.socket) -> None:
    """Options that both ends set: no delay for small frames, and notice of a host that vanished."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 15), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 4)):
        if hasattr(socket, name):
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
