"""Bytes that a socket did not take yet, so that a client can feed several servers without waiting for one."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import threading
import time
from collections import deque
from collections.abc import Callable

LIMIT = 256 << 20

_CHUNK = 1 << 20
_SPARE_CHUNKS = 32  # kept for the next time: the first touch of fresh memory costs more than the copy
# How long to wait for a full socket before bytes are copied. A peer that reads at memory speed makes room
# sooner, and the copy would cost as much as the waiting.
_PATIENCE_MS = 2
_POLL_MS = 200
_IOV_MAX = min(os.sysconf("SC_IOV_MAX"), 1024) if os.sysconf("SC_IOV_MAX") > 0 else 16


class _Chunk:
    __slots__ = ("end", "start", "view")

    def __init__(self) -> None:
        self.view = memoryview(bytearray(_CHUNK))
        self.start = self.end = 0


class Backlog:
    """The sending side of a plain (blocking) stream socket. One thread sends; what does not fit into the
    socket is copied, up to ``limit`` bytes, and a thread that lives as long as there is some sends it on, in
    order. The sender waits when it is full.

    Bytes are counted as the socket calls returned them. Once a call has failed, each later `send` raises
    its error. ``sent``: bytes that went out before.
    """

    def __init__(self, sock: socket.socket, limit: int = LIMIT, sent: int = 0) -> None:
        self._sock = sock
        self._limit = max(limit, 1)
        self._lock = threading.Lock()
        self._chunks: deque[_Chunk] = deque()
        self._spare: list[_Chunk] = []
        self._thread: threading.Thread | None = None
        self._closed = False
        self._direct = sent
        self._later = 0
        self._copied = 0
        self.error: OSError | None = None
        #: bytes that wait. Only the sender adds: once it sees 0, it stays so.
        self.waiting = 0

    @property
    def sent(self) -> int:
        """Bytes that the socket took."""
        return self._direct + self._later

    @property
    def accepted(self) -> int:
        """Bytes handed over so far, sent or waiting."""
        return self._direct + self._copied

    # -- the sender's side -------------------------------------------------------------------------

    def send_now(self, data: bytearray) -> int:
        """As much as the socket takes at once; nothing while there are bytes before these."""
        if self.waiting or self.error is not None:
            return 0
        try:
            sent = self._sock.send(data, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return 0
        self._direct += sent
        return sent

    def send(self, pieces: list[memoryview], drain: Callable[[], None] | None) -> None:
        """Sends or copies all pieces. While it has to wait for room, ``drain`` is called whenever the peer
        has sent something, and must receive it. Raises OSError."""
        if self.error is not None:
            raise self.error
        first = 0 if self.waiting else self._send_directly(pieces)
        for piece in pieces[first:]:
            at = 0
            while at < len(piece):
                copied = self._copy(piece[at:])
                at += copied
                if not copied:
                    self._wait_for_room(drain)

    def _send_directly(self, pieces: list[memoryview]) -> int:
        """The index of the first piece that did not fit; what of it did is cut off."""
        first = 0
        while first < len(pieces):
            try:
                sent = self._sock.sendmsg(pieces[first : first + _IOV_MAX], (), socket.MSG_DONTWAIT)
            except BlockingIOError:
                if not self._poll(select.POLLOUT, _PATIENCE_MS):
                    break
                continue
            self._direct += sent
            while first < len(pieces) and sent >= len(pieces[first]):
                sent -= len(pieces[first])
                first += 1
            if sent:
                pieces[first] = pieces[first][sent:]
        return first

    def _copy(self, piece: memoryview) -> int:
        """At most one chunk; 0 when the backlog is full."""
        with self._lock:
            if self.error is not None:
                raise self.error
            last = self._chunks[-1] if self._chunks else None
            if last is None or last.end == _CHUNK:
                last = self._spare.pop() if self._spare else _Chunk()
                self._chunks.append(last)
            size = min(len(piece), _CHUNK - last.end, self._limit - self.waiting)
            last.view[last.end : last.end + size] = piece[:size]
            last.end += size
            self.waiting += size
            self._copied += size
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="backlog", daemon=True)
                self._thread.start()
            return size

    def _wait_for_room(self, drain: Callable[[], None] | None) -> None:
        events = self._poll(select.POLLOUT | (select.POLLIN if drain is not None else 0), _POLL_MS)
        if drain is not None and events & select.POLLIN:
            drain()
        if events & ~select.POLLIN:
            with self._lock:
                self._pump()
            if self.error is not None:
                raise self.error

    def settle(self, drain: Callable[[], None] | None = None, timeout_s: float | None = None) -> bool:
        """Waits until nothing waits any more (or a call fails: the next `send` raises that), or for so long.
        Whether all is out."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while self.waiting:
            if deadline is not None and time.monotonic() > deadline:
                return False
            with contextlib.suppress(OSError) if drain is None else contextlib.nullcontext():
                self._wait_for_room(drain)
        return self.error is None

    def _poll(self, events: int, timeout_ms: int) -> int:
        poll = select.poll()
        poll.register(self._sock, events)
        ready = poll.poll(timeout_ms)
        return ready[0][1] if ready else 0

    def close(self) -> None:
        """Forgets what waits, and ends the thread. Before the socket is closed."""
        with self._lock:
            self._closed = True
            self._chunks.clear()
            self._spare.clear()
            self.waiting = 0
            thread = self._thread
        if thread is not None:
            with contextlib.suppress(OSError):  # not connected any more
                self._sock.shutdown(socket.SHUT_RDWR)  # wakes the thread
            thread.join(1.0)

    # -- either side -------------------------------------------------------------------------------

    def _pump(self) -> None:
        """Sends what the socket takes now. The lock is held. Never raises: see `error`."""
        try:
            while self._chunks:
                chunk = self._chunks[0]
                sent = self._sock.send(chunk.view[chunk.start : chunk.end], socket.MSG_DONTWAIT)
                chunk.start += sent
                self._later += sent
                if chunk.start == chunk.end:
                    self._chunks.popleft()
                    if len(self._spare) < _SPARE_CHUNKS:
                        chunk.start = chunk.end = 0
                        self._spare.append(chunk)
                # Last: who sees that nothing waits may send past us.
                self.waiting -= sent
        except BlockingIOError:
            return
        except OSError as exc:
            self.error = exc
            self._chunks.clear()
            self.waiting = 0

    def _run(self) -> None:
        while True:
            try:
                self._poll(select.POLLOUT, _POLL_MS)
            except (OSError, ValueError):  # the socket was closed: there is nothing left to send to
                self._closed = True
            with self._lock:
                if not self._closed:
                    self._pump()
                if self._closed or not self._chunks:
                    self._thread = None
                    return
