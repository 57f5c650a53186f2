"""Contents that are about to be uploaded, hashed while those before them are sent.

`Module.to` moves one parameter after the other. Which ones come next it alone knows: it announces them, and
the link takes their digests when their turn has come. A content that changed in between is hashed anew: a
write to the tensor, through any of its views, counts up its version. (A write that PyTorch does not count,
through numpy by another thread say, changes a tensor that is just being moved. What is then uploaded does not
have its digest, and the server refuses it.)
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable

import torch
from torch import Tensor

from genie.wire import digest
from genie.wire.tensors import is_dense, to_wire

#: contents from this size on are shared by digest; smaller ones are sent without
SHARED_BYTES = 64 << 10
#: bytes that are hashed before their turn
LOOK_AHEAD = 256 << 20

_PIECE = 4 << 20


class _Content:
    """A tensor's bytes, and their digest from the moment it is begun."""

    __slots__ = ("_hash", "nbytes", "tensor", "version")

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self.nbytes = tensor.nbytes
        self.version = -1
        self._hash: digest.ContentHash | None = None

    def begin(self) -> None:
        self.version = self.tensor._version
        _, data, _ = to_wire(self.tensor)
        self._hash = digest.ContentHash(self.nbytes, self.tensor)
        for at in range(0, self.nbytes, _PIECE):
            self._hash.add(data[at : at + _PIECE])

    @property
    def ready(self) -> bool:
        return self._hash is not None and self.tensor._version == self.version and self._hash.done

    def digest(self) -> bytes | None:
        if self._hash is None or self.tensor._version != self.version:
            return None
        return self._hash.digest()


class _Thread(threading.local):
    """What this thread announced: first those that are being hashed, then those whose turn is far off."""

    def __init__(self) -> None:
        self.begun: deque[_Content] = deque()
        self.begun_bytes = 0
        self.later: deque[_Content] = deque()


_mine = _Thread()


def announce(tensors: Iterable[Tensor]) -> None:
    """This thread will upload these, in about this order. Replaces what it announced before. Does nothing
    where no core is free to hash. `forget` must follow: until then the contents stay alive."""
    forget()
    if digest.threads() < 1:
        return
    seen = set()
    for t in tensors:
        counted = not t.is_inference()  # writes to the others leave no trace
        if t.device.type == "cpu" and t.layout is torch.strided and t.nbytes >= SHARED_BYTES and counted:
            t = t.detach()
            plain = is_dense(t.shape, t.stride()) and not t.is_conj() and not t.is_neg()
            if plain and t.data_ptr() not in seen:
                seen.add(t.data_ptr())  # tied parameters move once
                _mine.later.append(_Content(t))
    _begin_more()


def _begin_more() -> None:
    mine = _mine
    while mine.later and mine.begun_bytes < LOOK_AHEAD:
        content = mine.later.popleft()
        content.begin()
        mine.begun.append(content)
        mine.begun_bytes += content.nbytes


def take(tensor: Tensor) -> bytes | None:
    """The digest of a tensor whose turn has come, if it was announced and did not change since."""
    mine = _mine
    at, nbytes = tensor.data_ptr(), tensor.nbytes
    if not any(c.tensor.data_ptr() == at and c.nbytes == nbytes for c in mine.begun):
        return None
    while True:
        content = mine.begun.popleft()  # those before it were passed over
        mine.begun_bytes -= content.nbytes
        if content.tensor.data_ptr() == at and content.nbytes == nbytes:
            break
    _begin_more()
    return content.digest()


def ready() -> list[tuple[bytes, int]]:
    """Digests and bytes of those that come next, as far as they are hashed."""
    found = []
    for content in _mine.begun:
        known = content.digest() if content.ready else None
        if known is None:
            break
        found.append((known, content.nbytes))
    return found


def forget() -> None:
    """What this thread announced and did not upload."""
    _mine.begun.clear()
    _mine.begun_bytes = 0
    _mine.later.clear()
