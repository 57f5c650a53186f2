"""Contents on their way to the device: received, checked and copied at the same time.

While one piece is received, threads hash the pieces before it (where there are cores for that), and the GPU
copies them. An upload is bound to its handle when all that is done; other requests wait for it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any

import torch
from torch import Tensor

from genie.server.transfers import PIECE, PIECES, Transfers
from genie.wire import digest
from genie.wire.buffers import new_payload
from genie.wire.framing import Channel
from genie.wire.messages import Upload

#: a multiple of `digest.CHUNK`, as `PIECE` is. Where no thread hashes, pieces are small: the client's bytes
#: fill the socket meanwhile, and it holds a few MiB
PIECE_HASHED_HERE = 1 << 20
#: bytes of uploads that are received but not bound yet
WAITING = 256 << 20
#: without a message: then those that wait are finished, rather than the next one received
PAUSE_SECONDS = 0.002


class Staging:
    """Pieces of host memory that a session receives into and copies to the GPU from, again and again:
    `PIECES` of them, fewer while other sessions use the pool."""

    def __init__(self, transfers: Transfers) -> None:
        self._pool = transfers.pool
        self._busy: deque[tuple[Tensor, Any, Future[bytes] | None]] = deque()

    def take(self) -> Tensor:
        """Waits for the oldest if there are no more."""
        if len(self._busy) < PIECES:
            slot = self._pool.empty(PIECE)
            if slot is not None:
                return slot
        if not self._busy:
            return new_payload(PIECE)
        slot, copied, hashed = self._busy.popleft()
        _wait(copied, hashed)
        return slot

    def use(self, slot: Tensor, copied: Any, hashed: Future[bytes] | None) -> None:
        """The slot can be taken again after these."""
        self._busy.append((slot, copied, hashed))

    def drain(self) -> None:
        """Waits for all, and gives the memory back."""
        while self._busy:
            _, copied, hashed = self._busy.popleft()
            _wait(copied, hashed)


def _wait(copied: Any, hashed: Future[bytes] | None) -> None:
    if hashed is not None:
        hashed.result()
    if copied is not None:
        copied.synchronize()


class Landing:
    """Takes one content (see `genie.wire.framing.Sink`). Raises RuntimeError or MemoryError when there is no
    memory for it; ``checked``: its digest is wanted."""

    def __init__(self, transfers: Transfers, staging: Staging, nbytes: int, *, checked: bool) -> None:
        self.nbytes = nbytes
        self._transfers = transfers
        self._staging = staging
        self._content = transfers.new_content(nbytes)
        self._hash = digest.ContentHash(nbytes) if checked else None
        self._copied: Any = None  # the event of the last piece: copies end in order
        self._failure: RuntimeError | None = None

    def pieces(self) -> Iterator[memoryview]:
        if self._transfers.staged:
            yield from self._staged_pieces()
            return
        size = PIECE if digest.threads() else PIECE_HASHED_HERE
        memory = self._content.numpy().data
        for at in range(0, self.nbytes, size):
            piece = memory[at : at + size]
            yield piece
            if self._hash is not None:
                self._hash.add(piece)

    def _staged_pieces(self) -> Iterator[memoryview]:
        for at in range(0, self.nbytes, PIECE):
            try:
                slot = self._staging.take()
            except RuntimeError as exc:  # a copy before failed: the rest must be received all the same
                self._failure = self._failure or exc
                slot = new_payload(PIECE)
            used = slot[: min(PIECE, self.nbytes - at)]
            piece = used.numpy().data
            yield piece
            hashed = self._hash.add(piece) if self._hash is not None else None
            try:
                self._copied = self._transfers.fill(self._content[at : at + used.numel()], used)
            except RuntimeError as exc:
                self._failure = self._failure or exc
            self._staging.use(slot, self._copied, hashed)

    @property
    def ready(self) -> bool:
        """Whether `finish` would not wait."""
        hashed = self._hash is None or self._hash.done
        return hashed and (self._copied is None or self._copied.query())

    def finish(self) -> tuple[torch.UntypedStorage, bytes | None]:
        """The content on the device, and its digest if that is wanted. Waits; raises RuntimeError."""
        found = self._hash.digest() if self._hash is not None else None
        if self._failure is not None:
            raise self._failure
        if self._copied is not None:
            self._copied.synchronize()
        self._transfers.filled(self._content)
        return self._content.untyped_storage(), found


class Uploads:
    """Those of one session that are received but not bound yet, in order. ``finish(message, landing)`` binds
    one, or says why not; it raises nothing."""

    def __init__(self, transfers: Transfers, finish: Callable[[Upload, Landing], None]) -> None:
        self._transfers = transfers
        self._finish = finish
        self.staging = Staging(transfers)
        self.waiting: deque[tuple[Upload, Landing]] = deque()
        self.nbytes = 0  # of those that wait

    def landing(self, nbytes: int, *, checked: bool) -> Landing:
        """Raises RuntimeError or MemoryError."""
        return Landing(self._transfers, self.staging, nbytes, checked=checked)

    def add(self, message: Upload, landing: Landing) -> None:
        self.waiting.append((message, landing))
        self.nbytes += landing.nbytes
        while self.nbytes > WAITING:
            self._finish_oldest()

    def may_settle(self, channel: Channel) -> bool:
        """Whether the client pauses, so that `settle` keeps it from nothing."""
        if channel.has_more():
            return False
        return all(landing.ready for _, landing in self.waiting) or not channel.has_more(PAUSE_SECONDS)

    def settle(self) -> None:
        """Binds all."""
        while self.waiting:
            self._finish_oldest()
        self.staging.drain()

    def _finish_oldest(self) -> None:
        message, landing = self.waiting.popleft()
        self.nbytes -= landing.nbytes
        self._finish(message, landing)

    def clear(self) -> None:
        """Forgets all; the session has ended."""
        self.waiting.clear()
        self.nbytes = 0
