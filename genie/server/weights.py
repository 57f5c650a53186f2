"""Contents that several sessions share, found by their digest (`genie.wire.digest`)."""

from __future__ import annotations

import threading
from collections import OrderedDict

import torch
from torch.multiprocessing.reductions import StorageWeakRef


class WeightStore:
    """Digest to storage, by weak reference: a content lives while a handle of any session is on it
    (a view suffices), so a session that ends or dies frees what nobody else uses.

    ``keep_bytes``: contents used last are kept alive up to so many bytes for a session yet to come.
    """

    def __init__(self, keep_bytes: int = 0) -> None:
        self._lock = threading.Lock()
        self._contents: dict[bytes, StorageWeakRef] = {}
        self._keep_bytes = keep_bytes
        self._kept: OrderedDict[bytes, torch.UntypedStorage] = OrderedDict()
        self._kept_size = 0

    def find(self, digest: bytes) -> torch.UntypedStorage | None:
        with self._lock:
            return self._find(digest)

    def add(self, digest: bytes, storage: torch.UntypedStorage) -> torch.UntypedStorage:
        """The content to use from now on: ``storage``, or an equal one that was there before.

        The caller has verified the digest.
        """
        with self._lock:
            there = self._find(digest)
            if there is not None:
                return there
            self._contents = {d: w for d, w in self._contents.items() if not w.expired()}
            self._contents[digest] = StorageWeakRef(storage)
            self._keep(digest, storage)
            return storage

    def _find(self, digest: bytes) -> torch.UntypedStorage | None:
        weak = self._contents.get(digest)
        if weak is None:
            return None
        storage = torch.UntypedStorage._new_with_weak_ptr(weak.cdata)
        if storage is None:
            del self._contents[digest]
        elif digest in self._kept:
            self._kept.move_to_end(digest)
        return storage

    def _keep(self, digest: bytes, storage: torch.UntypedStorage) -> None:
        if storage.nbytes() > self._keep_bytes:
            return
        self._kept[digest] = storage
        self._kept_size += storage.nbytes()
        while self._kept_size > self._keep_bytes:
            _, oldest = self._kept.popitem(last=False)
            self._kept_size -= oldest.nbytes()

    @property
    def nbytes(self) -> int:
        """Bytes of all contents that are alive."""
        with self._lock:
            found = [self._find(d) for d in list(self._contents)]
        return sum(s.nbytes() for s in found if s is not None)
