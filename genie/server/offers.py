"""Contents that a client offered and this server has: from another session, or in a file that it can read."""

from __future__ import annotations

import logging
from collections import deque

import torch

from genie.errors import OutOfMemoryError, ProtocolError
from genie.server.checkpoints import ChangedError, Checkpoints, Place
from genie.server.store import HandleStore
from genie.server.uploads import WAITING, Landing, Uploads
from genie.server.weights import WeightStore
from genie.wire.messages import Offer, Wanted

log = logging.getLogger("genie.server")


class Offers:
    """Of one session. What was found stays until it is adopted, even if the session that had it ends."""

    def __init__(
        self, weights: WeightStore, checkpoints: Checkpoints, uploads: Uploads, store: HandleStore
    ) -> None:
        self._weights = weights
        self._checkpoints = checkpoints
        self._uploads = uploads
        self._store = store
        self._reserved: dict[bytes, torch.UntypedStorage] = {}

    def answer(self, m: Offer) -> Wanted:
        """Raises ProtocolError."""
        if len(m.digests) != len(m.nbytes):
            raise ProtocolError(f"an offer of {len(m.digests)} digests came with {len(m.nbytes)} sizes")
        missing = []
        in_files: list[tuple[int, bytes, Place]] = []
        for i, (digest, nbytes) in enumerate(zip(m.digests, m.nbytes, strict=True)):
            storage = self._weights.find(digest)
            if storage is not None and storage.nbytes() == nbytes:
                self._reserved[digest] = storage
                continue
            place = self._checkpoints.find(digest, nbytes)
            if place is not None:
                in_files.append((i, digest, place))
            else:
                missing.append(i)
        if in_files:
            unread = self._load(in_files)
            log.info("%d contents were loaded from checkpoints", len(in_files) - len(unread))
            missing = sorted(missing + unread)
        return Wanted(missing)

    def take(self, digest: bytes, nbytes: int) -> torch.UntypedStorage:
        """What an offer found, or is here all the same. Raises ProtocolError."""
        storage = self._reserved.pop(digest, None) or self._weights.find(digest)
        if storage is None or storage.nbytes() != nbytes:
            raise ProtocolError(
                f"no content of {nbytes} bytes with the digest {digest.hex()[:16]} is here: "
                "offer it first, and upload what the server wants"
            )
        return storage

    def clear(self) -> None:
        self._reserved.clear()

    def _load(self, in_files: list[tuple[int, bytes, Place]]) -> list[int]:
        """Reads contents to the device; returns the numbers of those that the client must send after all."""
        unread: list[int] = []
        waiting: deque[tuple[int, bytes, Place, Landing]] = deque()
        for i, digest, place in in_files:
            held = sum({s._cdata: s.nbytes() for s in self._reserved.values()}.values())
            under_way = sum(entry[3].nbytes for entry in waiting)
            try:
                self._store.reserve(place.nbytes + held + under_way)
                landing = self._uploads.landing(place.nbytes, checked=True)
                place.read(landing.pieces())
            except (OutOfMemoryError, RuntimeError, MemoryError) as exc:
                # The client sends it, and is told there that the memory does not suffice.
                log.info("%s of %s is not loaded: %s", place.name, place.file.path, exc)
                unread.append(i)
            except (OSError, ChangedError) as exc:
                self._checkpoints.drop(place, exc)
                unread.append(i)
            else:
                waiting.append((i, digest, place, landing))
                if under_way + place.nbytes > WAITING:
                    unread += self._finish(*waiting.popleft())
        for entry in waiting:
            unread += self._finish(*entry)
        self._uploads.staging.drain()
        return unread

    def _finish(self, i: int, digest: bytes, place: Place, landing: Landing) -> list[int]:
        """Reserves it. Else it must be sent: its number."""
        try:
            storage, found = landing.finish()
        except RuntimeError as exc:
            log.warning("%s of %s is not loaded: %s", place.name, place.file.path, exc)
            return [i]
        if found != digest:
            self._checkpoints.drop(place, f"{place.name} does not have its digest any more")
            return [i]
        self._reserved[digest] = self._weights.add(digest, storage)
        return []
