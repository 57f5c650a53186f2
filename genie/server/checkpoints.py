"""Contents in safetensors files that the server can read itself, so that clients need not send them.

Files are found by their suffix and read through their own header: nothing is unpickled or executed. A
tensor's digest is computed when a client first offers one of its size, and kept on disk for a file that stays
as it is. What is in a file is believed only after it has been read and hashed again on its way to the device.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import tempfile
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
from safetensors import SafetensorError, safe_open

from genie import cache
from genie.errors import ConfigError
from genie.wire.ahead import SHARED_BYTES
from genie.wire.digest import ContentHash

log = logging.getLogger("genie.server")

SUFFIX = ".safetensors"
#: directories are looked through again when something is offered, at most so often
LOOK_AGAIN_SECONDS = 5.0

_PIECE = 4 << 20
_PIECES_AHEAD = 16  # read and not yet hashed


class ChangedError(Exception):
    """A file is not what it was when it was indexed."""


class _Digests(msgspec.Struct):
    """What is kept on disk about one file."""

    path: str
    size: int
    mtime_ns: int
    digests: dict[str, str]  # hex, by the tensor's name


@dataclass(eq=False)
class _File:
    path: str
    size: int
    mtime_ns: int
    #: tensors that a client may offer: where their bytes start in the file, and how many there are
    places: dict[str, tuple[int, int]] = field(default_factory=dict)
    digests: dict[str, bytes] = field(default_factory=dict)

    @contextlib.contextmanager
    def opened(self) -> Iterator[int]:
        """A descriptor. Raises OSError, or ChangedError: also at the end, for what was read meanwhile."""
        fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            self._check(fd)
            yield fd
            self._check(fd)
        finally:
            os.close(fd)

    def _check(self, fd: int) -> None:
        found = os.fstat(fd)
        if (found.st_size, found.st_mtime_ns) != (self.size, self.mtime_ns):
            raise ChangedError("it was changed since it was indexed")


@dataclass(frozen=True)
class Place:
    """One content in a file."""

    file: _File
    name: str
    start: int
    nbytes: int

    def read(self, pieces: Iterator[memoryview]) -> None:
        """Fills the pieces, which are ``nbytes`` together. Raises OSError or ChangedError."""
        with self.file.opened() as fd:
            at = self.start
            for piece in pieces:
                _read(fd, piece, at)
                at += len(piece)


class Checkpoints:
    """An index of all files below ``directories``. Any thread may use it. Raises ConfigError for what is no
    directory."""

    def __init__(self, directories: Sequence[str] = ()) -> None:
        for d in directories:
            if not Path(d).is_dir():
                raise ConfigError(f"--checkpoints {d}: name a directory that holds *{SUFFIX} files")
        self._directories = list(directories)
        self._lock = threading.Lock()
        self._files: dict[str, _File] = {}
        self._refused: dict[str, tuple[int, int]] = {}  # size and mtime of files that cannot be used
        self._by_size: dict[int, list[Place]] = {}
        self._by_digest: dict[bytes, Place] = {}
        self._looked = float("-inf")
        self._writable = True
        if directories:
            self._look()

    def find(self, digest: bytes, nbytes: int) -> Place | None:
        """Where such a content is. Hashes the tensors of that size which have no digest yet: this may take as
        long as reading them."""
        if not self._directories:
            return None
        with self._lock:
            if time.monotonic() - self._looked > LOOK_AGAIN_SECONDS:
                self._look()
            self._hash_all(nbytes)
            place = self._by_digest.get(digest)
            return place if place is not None and place.nbytes == nbytes else None

    def drop(self, place: Place, why: object) -> None:
        """The file does not hold what it should. It is not used any more, unless it is found changed."""
        log.warning("%s is not used: %s. Clients send what it held", place.file.path, why)
        with self._lock:
            file = self._files.pop(place.file.path, None)
            if file is not None:
                self._refused[file.path] = (file.size, file.mtime_ns)
                self._index()
            with contextlib.suppress(OSError):  # then the next server, too, finds out when it reads the file
                _cache_file(place.file.path).unlink(missing_ok=True)

    # -- files -----------------------------------------------------------------------------------

    def _look(self) -> None:
        """Finds what came, changed or vanished."""
        found: dict[str, os.stat_result] = {}
        for directory in self._directories:
            for folder, _, names in os.walk(directory, onerror=lambda exc: log.warning("%s", exc)):
                for name in names:
                    if name.endswith(SUFFIX):
                        path = os.path.realpath(os.path.join(folder, name))
                        try:
                            found[path] = os.stat(path)
                        except OSError as exc:
                            log.warning("%s cannot be read: %s", path, exc.strerror)
        changed = False
        for path in [p for p in self._files if p not in found]:
            log.warning("%s has vanished: clients send what it held", path)
            del self._files[path]
            changed = True
        for path, stat in found.items():
            is_now = (stat.st_size, stat.st_mtime_ns)
            file = self._files.get(path)
            if self._refused.get(path) == is_now or (file and (file.size, file.mtime_ns) == is_now):
                continue
            if file is not None:
                log.info("%s was changed: it is indexed anew", path)
                del self._files[path]
            changed = True
            try:
                self._files[path] = _indexed(path, *is_now)
            except (SafetensorError, OSError, ValueError, ChangedError) as exc:
                log.warning("%s is not used: %s. Clients send what it holds", path, exc)
                self._refused[path] = is_now
        if changed:
            self._index()
        self._looked = time.monotonic()

    def _index(self) -> None:
        self._by_size.clear()
        self._by_digest.clear()
        for file in self._files.values():
            for name, (start, nbytes) in file.places.items():
                place = Place(file, name, start, nbytes)
                self._by_size.setdefault(nbytes, []).append(place)
                if name in file.digests:
                    self._by_digest[file.digests[name]] = place
        log.info(
            "%d checkpoint files with %d tensors, %d bytes",
            len(self._files), sum(map(len, self._by_size.values())),
            sum(n * len(places) for n, places in self._by_size.items()),
        )  # fmt: skip

    # -- digests ---------------------------------------------------------------------------------

    def _hash_all(self, nbytes: int) -> None:
        """Tensors of this size."""
        to_hash: dict[_File, list[Place]] = {}
        for place in self._by_size.get(nbytes, ()):
            if place.name not in place.file.digests:
                to_hash.setdefault(place.file, []).append(place)
        for file, places in to_hash.items():
            try:
                with file.opened() as fd:
                    found = _hashed(fd, places)
            except (OSError, ChangedError) as exc:
                # The next look finds out what became of it.
                log.warning("%s cannot be used now: %s. Clients send what it held", file.path, exc)
                self._files.pop(file.path, None)
                self._index()
                continue
            for place, digest in zip(places, found, strict=True):
                file.digests[place.name] = digest
                self._by_digest[digest] = place
            self._save(file)

    def _save(self, file: _File) -> None:
        """For the next server that reads this file. Readers see the old digests or the new, never a part."""
        path = _cache_file(file.path)
        known = _Digests(
            file.path, file.size, file.mtime_ns, {name: d.hex() for name, d in file.digests.items()}
        )
        temporary = ""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".part", delete=False) as out:
                temporary = out.name
                out.write(msgspec.json.encode(known))
            os.replace(temporary, path)
        except OSError as exc:
            if temporary:
                Path(temporary).unlink(missing_ok=True)
            if self._writable:
                log.warning(
                    "digests of checkpoints cannot be kept in %s (%s): every server computes them anew; name "
                    "a directory that can be written in GENIE_CACHE_DIR", path.parent, exc.strerror,
                )  # fmt: skip
            self._writable = False


def _indexed(path: str, size: int, mtime_ns: int) -> _File:
    """Raises SafetensorError, OSError, ValueError or ChangedError."""
    with safe_open(path, framework="numpy"):
        pass  # the header is sound, and its offsets are within the file
    file = _File(path, size, mtime_ns)
    with file.opened() as fd, open(fd, "rb", closefd=False) as data:
        length = int.from_bytes(data.read(8), "little")
        header = json.loads(data.read(length))
    for name, entry in header.items():
        if name != "__metadata__":
            start, end = entry["data_offsets"]
            if end - start >= SHARED_BYTES:
                file.places[name] = (8 + length + start, end - start)
    file.digests = _known_digests(file)
    return file


def _known_digests(file: _File) -> dict[str, bytes]:
    path = _cache_file(file.path)
    try:
        known = msgspec.json.decode(path.read_bytes(), type=_Digests)
        if (known.path, known.size, known.mtime_ns) == (file.path, file.size, file.mtime_ns):
            return {name: bytes.fromhex(d) for name, d in known.digests.items() if name in file.places}
    except FileNotFoundError:
        pass  # nobody has needed it yet
    except (OSError, ValueError) as exc:
        log.warning("%s cannot be used (%s): its digests are computed anew", path, exc)
    return {}


def _cache_file(path: str) -> Path:
    return cache.directory("checkpoints") / f"{hashlib.sha256(path.encode()).hexdigest()[:24]}.json"


def _read(fd: int, piece: memoryview, at: int) -> None:
    done = 0
    while done < len(piece):
        n = os.preadv(fd, [piece[done:]], at + done)
        if not n:
            raise ChangedError("it is shorter than it was")
        done += n


def _hashed(fd: int, places: Sequence[Place]) -> list[bytes]:
    under_way: deque[Future[bytes]] = deque()
    contents = []
    for place in places:
        content = ContentHash(place.nbytes)
        for at in range(0, place.nbytes, _PIECE):
            # Not mapped: a file that is cut short meanwhile would end the process.
            piece = memoryview(bytearray(min(_PIECE, place.nbytes - at)))
            _read(fd, piece, place.start + at)
            part = content.add(piece)
            if part is not None:
                under_way.append(part)
                if len(under_way) > _PIECES_AHEAD:
                    under_way.popleft().result()
        contents.append(content)
    return [c.digest() for c in contents]
