"""`genie.profile`: takes a profile of a block and writes it."""

from __future__ import annotations

import gzip
import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter_ns

from genie.errors import ConfigError, GenieError
from genie.profiling import spans
from genie.profiling.chrome import document
from genie.profiling.recording import Recording

#: spans and programs kept of one process; a decode of GPT-2 takes some 30 of them per token
LIMIT = 200_000
_taking = threading.Lock()


@contextmanager
def profile(path: str | os.PathLike[str], *, ops: bool = False, limit: int = LIMIT) -> Iterator[None]:
    """Writes what happens in the block to ``path``, as a trace for ui.perfetto.dev or chrome://tracing.

    The client and every server that its sessions use are shown on one clock; sessions may be opened
    before the block or in it. A name that ends in ``.gz`` is compressed. With ``ops`` servers time
    each instruction too, with a device synchronization after each (and so run slower). Beyond
    ``limit`` spans of one process the later ones are dropped; the trace says how many.

    The trace is written also when the block raises. Raises ConfigError before the block runs when
    ``path`` cannot be written or ``limit`` is not positive, GenieError inside another profile.
    """
    target = Path(path)
    if limit < 1:
        raise ConfigError(f"limit={limit}: a profile keeps at least one span; leave limit out for {LIMIT}")
    if not _taking.acquire(blocking=False):
        raise GenieError(
            "a profile is being taken already, in this thread or another: leave its block first "
            "(one profile shows all sessions of the process)"
        )
    try:
        unfinished = _writable(target)
        recording = Recording(ops, limit)
        try:
            spans.active = recording
            for session in list(spans.sessions):
                recording.opened(session)
            recording.start = perf_counter_ns()
            yield
        finally:
            recording.end = perf_counter_ns()
            for session in list(spans.sessions):
                recording.closed(session)
            spans.active = None
            _write(recording, target, unfinished)
    finally:
        _taking.release()


def _writable(target: Path) -> Path:
    """An empty file beside ``target`` that becomes it in the end: no reader meets half a trace."""
    unfinished = target.with_name(target.name + ".unfinished")
    try:
        if target.is_dir():
            raise IsADirectoryError(21, "it is a directory")
        unfinished.write_bytes(b"")
    except OSError as exc:
        raise ConfigError(
            f"the trace cannot be written to {target} ({exc.strerror}): name a file in a folder "
            "that exists and that you may write to"
        ) from exc
    return unfinished


def _write(recording: Recording, target: Path, unfinished: Path) -> None:
    text = json.dumps(document(recording), separators=(",", ":")).encode()
    unfinished.write_bytes(gzip.compress(text, 6) if target.suffix == ".gz" else text)
    unfinished.replace(target)
