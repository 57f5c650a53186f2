"""Memory for received payloads. Large blocks are used again when the tensors in them have died:
the first touch of fresh memory costs more than receiving into it (measured: 85 ms against 60 ms
for 64 MiB, page faults of a virtual machine). Contents that stay, such as weights, never return.

Memory that is dear to make, such as pinned memory, comes from a `BoundedPool`: made once, lent again and
again.
"""

from __future__ import annotations

import logging
import mmap
import threading
import weakref
from collections.abc import Callable

import torch
from torch import Tensor

POOLED_FROM = 1 << 20  # bytes; what is smaller the C library's own free lists serve well
KEEP_BYTES = 128 << 20
SMALLEST_BLOCK = 64 << 10

log = logging.getLogger(__name__)


class BlockPool:
    """Blocks whose tensors died, up to ``keep_bytes`` of them, the oldest unmapped first."""

    def __init__(self, keep_bytes: int = KEEP_BYTES) -> None:
        self._keep_bytes = keep_bytes
        self._free: list[mmap.mmap] = []
        self.free_bytes = 0
        # Reentrant: the garbage collector may run a block's finalizer inside any of our own lines.
        self._lock = threading.RLock()
        self._loans: dict[int, weakref.ref[memoryview]] = {}

    def empty(self, nbytes: int) -> Tensor:
        """Uninitialised bytes in a storage of exactly ``nbytes``. Raises MemoryError."""
        block = self._take(nbytes)
        view = memoryview(block)
        key = id(view)
        self._loans[key] = weakref.ref(view, lambda _: self._give_back(key, block))
        return torch.frombuffer(view, dtype=torch.uint8, count=nbytes)

    def _take(self, nbytes: int) -> mmap.mmap:
        with self._lock:
            fitting = [b for b in self._free if nbytes <= len(b) <= 2 * nbytes]
            if fitting:
                block = min(fitting, key=len)
                self._free.remove(block)
                self.free_bytes -= len(block)
                return block
        try:
            return mmap.mmap(-1, nbytes)
        except (OSError, OverflowError, ValueError) as exc:
            raise MemoryError(f"cannot map {nbytes} bytes: {exc}") from exc

    def _give_back(self, key: int, block: mmap.mmap) -> None:
        with self._lock:
            self._loans.pop(key, None)
            self._free.append(block)
            self.free_bytes += len(block)
            while self.free_bytes > self._keep_bytes:
                self.free_bytes -= len(self._free.pop(0))


class BoundedPool:
    """Blocks of powers of two, ``limit`` bytes of them in all, that are never given back.
    ``new_block(nbytes)`` makes one (uint8, on the CPU); once it has raised RuntimeError, no more are made."""

    def __init__(self, limit: int, new_block: Callable[[int], Tensor]) -> None:
        self._limit = limit
        self._new_block = new_block
        self._free: list[Tensor] = []
        self.made_bytes = 0
        self._lock = threading.RLock()  # see BlockPool
        self._loans: dict[int, weakref.ref[memoryview]] = {}

    def empty(self, nbytes: int) -> Tensor | None:
        """Uninitialised bytes in a storage of exactly ``nbytes``, which return when every tensor on it is
        dead. None while too much is lent."""
        with self._lock:
            size = max(SMALLEST_BLOCK, 1 << (nbytes - 1).bit_length())
            block = self._take(nbytes, 4 * size)
            block = self._make(size) if block is None else block
            block = self._take(nbytes, self._limit) if block is None else block
            if block is None:
                return None
            view = memoryview(block.numpy().data)
            key, lent = id(view), block
            self._loans[key] = weakref.ref(view, lambda _: self._give_back(key, lent))
        return torch.frombuffer(view, dtype=torch.uint8, count=nbytes)

    def reserve(self, count: int, size: int) -> None:
        """Makes ``count`` blocks of ``size`` bytes in one allocation: pinning memory takes long each time."""
        with self._lock:
            together = self._make(count * size)
            if together is not None:
                self._free += together.split(size)

    def _take(self, nbytes: int, largest: int) -> Tensor | None:
        fitting = [i for i, b in enumerate(self._free) if nbytes <= b.numel() <= largest]
        return self._free.pop(min(fitting, key=lambda i: self._free[i].numel())) if fitting else None

    def _make(self, size: int) -> Tensor | None:
        if self.made_bytes + size > self._limit:
            return None
        try:
            block = self._new_block(size)
        except RuntimeError as exc:
            log.warning("no more than %d bytes of fast host memory can be had: %s", self.made_bytes, exc)
            self._limit = self.made_bytes
            return None
        self.made_bytes += size
        return block

    def _give_back(self, key: int, block: Tensor) -> None:
        with self._lock:
            self._loans.pop(key, None)
            self._free.append(block)


_POOL = BlockPool()


def new_payload(nbytes: int) -> Tensor:
    """Uninitialised uint8 on the CPU, in a storage of its own."""
    return torch.empty(nbytes, dtype=torch.uint8) if nbytes < POOLED_FROM else _POOL.empty(nbytes)
