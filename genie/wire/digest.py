"""The digest by which contents are known: SHA-256 over the SHA-256s of chunks, so that cores share the work.

    chunk_i = SHA-256(bytes i * CHUNK to (i + 1) * CHUNK)                  the last one may be shorter
    digest  = SHA-256("genie content 1" | CHUNK u64 LE | length u64 LE | chunk_0 | chunk_1 | ...)

It is as collision resistant as SHA-256. The length and CHUNK fix how many chunks there are and how long each
is. Two contents of different lengths have different inputs to the outer hash. Two of the same length differ
in some chunk: either its hashes collide, or the inputs to the outer hash differ, and then equal digests are a
collision there. Who checks a content computes both levels from its bytes, so hashes of chunks are never taken
from anybody.

Chunks are hashed by threads (hashlib lets go of the GIL), one fewer than this process may use cores, beside
the caller; where that is none, by the caller alone.
"""

from __future__ import annotations

import hashlib
import os
import struct
import threading
from concurrent.futures import Future, ThreadPoolExecutor

CHUNK = 1 << 20
#: 8 threads hash faster than loopback carries (1.5-2 GB/s each): more would take cores from what moves bytes
MAX_THREADS = 8

_PREFIX = b"genie content 1"
_SIZES = struct.Struct("<QQ")

_lock = threading.Lock()
_executor: ThreadPoolExecutor | None = None
_threads = 0


def threads() -> int:
    """Threads that hash beside the caller: none where this thread may use one core only."""
    return min(len(os.sched_getaffinity(0)) - 1, MAX_THREADS)


def _pool() -> ThreadPoolExecutor | None:
    global _executor, _threads
    wanted = threads()
    if wanted < 1:
        return None
    with _lock:
        if _executor is None or _threads != wanted:
            if _executor is not None:
                _executor.shutdown(wait=False)  # what it was given it still does
            _executor, _threads = ThreadPoolExecutor(wanted, "digest"), wanted
        return _executor


def _forget_threads() -> None:
    global _executor, _lock
    _executor, _lock = None, threading.Lock()


os.register_at_fork(after_in_child=_forget_threads)


def _chunks(piece: memoryview, owner: object) -> bytes:
    # ``owner`` is named only to live as long: a caller that was interrupted may let go of the memory.
    sha256 = hashlib.sha256
    return b"".join([sha256(piece[at : at + CHUNK]).digest() for at in range(0, len(piece), CHUNK)])


class ContentHash:
    """The digest of ``nbytes`` bytes that come piece by piece, in order. A piece's memory must stay as it is
    until it is hashed: see what `add` returns. All pieces but the last are multiples of `CHUNK`. ``owner`` is
    kept alive meanwhile, for pieces that do not see to that themselves."""

    def __init__(self, nbytes: int, owner: object = None) -> None:
        self._nbytes = nbytes
        self._owner = owner
        self._added = 0
        self._parts: list[bytes | Future[bytes]] = []

    def add(self, piece: memoryview, *, here: bool = False) -> Future[bytes] | None:
        """Hashes the piece in a thread; None if it was hashed at once: no core is free for that, or it is to
        be done ``here``. Raises ValueError for a piece that is not aligned."""
        if self._added % CHUNK:
            raise ValueError(f"a piece after {self._added} bytes: all but the last are multiples of {CHUNK}")
        self._added += len(piece)
        pool = None if here else _pool()
        if pool is None:
            self._parts.append(_chunks(piece, self._owner))
            return None
        part = pool.submit(_chunks, piece, self._owner)
        self._parts.append(part)
        return part

    @property
    def done(self) -> bool:
        """Whether `digest` would not wait."""
        return all(isinstance(p, bytes) or p.done() for p in self._parts)

    def digest(self) -> bytes:
        """Waits for the threads. Raises ValueError if not all bytes were added."""
        if self._added != self._nbytes:
            raise ValueError(f"{self._added} bytes were added, not {self._nbytes}")
        outer = hashlib.sha256(_PREFIX + _SIZES.pack(CHUNK, self._nbytes))
        for part in self._parts:
            outer.update(part if isinstance(part, bytes) else part.result())
        return outer.digest()


def digest(data: memoryview | bytes, owner: object = None) -> bytes:
    """The digest of a content that is all there, hashed by the caller and the threads together.
    ``owner``: see `ContentHash`."""
    view = memoryview(data).cast("B")
    content = ContentHash(len(view), owner)
    chunks = -(-len(view) // CHUNK)
    sharers = min(threads() + 1, chunks)
    at = 0
    for k in range(sharers):
        end = min(chunks * (k + 1) // sharers * CHUNK, len(view))
        content.add(view[at:end], here=k == sharers - 1)  # the caller's own part comes last
        at = end
    return content.digest()
