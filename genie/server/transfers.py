"""Bytes between host memory and the device.

For a GPU they go through pinned memory, from a pool of bounded size, and to the device on a stream of their
own: the copy of one tensor, the receiving of the next and the work of the one before overlap.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from genie.wire.buffers import BoundedPool, new_payload

PINNED_BYTES = 256 << 20
#: pieces in which contents are received, and their bytes; made when the server starts
PIECES = 16
PIECE = 4 << 20
#: smaller ones are copied from pageable memory: the driver takes them along with the command
PINNED_FROM = 64 << 10


def _pin(nbytes: int) -> Tensor:
    return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)


def _ordinary(nbytes: int) -> Tensor:
    return torch.empty(nbytes, dtype=torch.uint8)


class Transfers:
    """Of one device. On the CPU nothing is copied, unless it is ``staged`` as for a GPU (by tests)."""

    def __init__(self, device: torch.device, *, staged: bool = False) -> None:
        self._device = device
        self.is_cuda = device.type == "cuda"
        self.staged = staged or self.is_cuda
        self.pool = BoundedPool(PINNED_BYTES, _pin if self.is_cuda else _ordinary)
        if self.is_cuda:
            self.pool.reserve(PIECES, PIECE)
        #: on which contents and inputs are copied to the GPU
        self.stream: Any = torch.cuda.Stream(device) if self.is_cuda else None
        #: host memory that copies may still read or write, with the event after each
        self._read: deque[tuple[Any, Tensor]] = deque()

    def new_payload(self, nbytes: int) -> Tensor:
        """Host memory to receive into (uint8); for a GPU pinned, as far as the pool goes. Raises
        MemoryError."""
        if self.staged and nbytes >= PINNED_FROM:
            block = self.pool.empty(nbytes)
            if block is not None:
                return block
        return new_payload(nbytes)

    def _forget_done(self) -> None:
        while self._read and self._read[0][0].query():
            self._read.popleft()

    # -- to the device ---------------------------------------------------------------------------

    def to_device(self, tensor: Tensor) -> Tensor:
        """Keeps the strides. On the CPU the tensor itself. Work on the current stream comes after the copy;
        the caller does not wait, and must not write to ``tensor`` any more. One thread at a time."""
        if not self.is_cuda:
            return tensor
        self._forget_done()
        if tensor.nbytes < PINNED_FROM:
            return tensor.to(self._device, non_blocking=True)
        current = torch.cuda.current_stream(self._device)
        with torch.cuda.stream(self.stream):
            moved = tensor.to(self._device, non_blocking=True)
            event = self.stream.record_event()
        current.wait_event(event)
        moved.record_stream(current)
        self._read.append((event, tensor))
        return moved

    def new_content(self, nbytes: int) -> Tensor:
        """Memory on the device (uint8), to be filled by `fill`. Raises RuntimeError or MemoryError."""
        if not self.is_cuda:
            return new_payload(nbytes)
        # On the copying stream: memory that the current one frees may still be in use there.
        with torch.cuda.stream(self.stream):
            return torch.empty(nbytes, dtype=torch.uint8, device=self._device)

    def fill(self, target: Tensor, source: Tensor) -> Any:
        """Copies host memory to a part of a new content. The event after which ``source`` may be written to
        again; None: at once."""
        if not self.is_cuda:
            target.copy_(source)
            return None
        with torch.cuda.stream(self.stream):
            target.copy_(source, non_blocking=True)
            return self.stream.record_event()

    def filled(self, content: Tensor) -> None:
        """To be called when the events of all parts have come: work on the current stream uses it now."""
        if self.is_cuda:
            content.record_stream(torch.cuda.current_stream(self._device))

    # -- to the host -----------------------------------------------------------------------------

    def to_host(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Copies in host memory, dense, in the same order of dimensions, once the current stream has made
        them. On the CPU the tensors themselves. All copies are on their way before one is waited for."""
        return self.reading(tensors)()

    def reading(self, tensors: Sequence[Tensor]) -> Callable[[], list[Tensor]]:
        """`to_host` under way: what is returned waits for it. One thread at a time."""
        if not self.is_cuda:
            found = list(tensors)
            return lambda: found
        self._forget_done()
        copies: list[Tensor] = []
        for t in tensors:
            plain = t.resolve_conj().resolve_neg()
            stride = torch.empty_like(plain, device="meta").stride()
            nbytes = plain.numel() * plain.element_size()
            # For small ones the host allocator of torch keeps pinned memory.
            memory = _pin(nbytes) if nbytes < PINNED_FROM else self.new_payload(nbytes)
            host = torch.empty(0, dtype=plain.dtype).set_(memory.untyped_storage(), 0, plain.shape, stride)
            copies.append(host.copy_(plain, non_blocking=True))
        done = torch.cuda.current_stream(self._device).record_event()
        # Whoever asked may lose interest: the pool's memory is not lent again before the copies are there.
        self._read += ((done, copy) for copy in copies if copy.nbytes >= PINNED_FROM)

        def read() -> list[Tensor]:
            done.synchronize()
            return copies

        return read
