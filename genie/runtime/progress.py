"""A progress bar for large uploads; silent where nobody watches."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

VISIBLE_BYTES = 64 << 20
_listener: Callable[[int], None] | None = None


@contextmanager
def reported_to(listener: Callable[[int], None]) -> Iterator[None]:
    """Inside, ``listener`` gets the bytes of every upload of this process, and no bar is drawn."""
    global _listener
    before, _listener = _listener, listener
    try:
        yield
    finally:
        _listener = before


class UploadProgress:
    """Counts bytes as they are sent and shows a bar on a terminal once they are many."""

    def __init__(self) -> None:
        self._sent = 0
        self._bar: Any = None
        self._task: Any = None

    def add(self, nbytes: int) -> None:
        if _listener is not None:
            _listener(nbytes)
            return
        self._sent += nbytes
        if self._bar is None and self._sent >= VISIBLE_BYTES and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import (
                DownloadColumn,
                Progress,
                TextColumn,
                TimeElapsedColumn,
                TransferSpeedColumn,
            )

            columns = (
                TextColumn("uploading weights"),
                DownloadColumn(),
                TransferSpeedColumn(),
                TimeElapsedColumn(),
            )
            self._bar = Progress(*columns, console=Console(stderr=True), transient=True)
            self._bar.start()
            self._task = self._bar.add_task("upload", total=None)
        if self._bar is not None:
            self._bar.update(self._task, completed=self._sent)

    def finish(self) -> None:
        """The burst of uploads is over: a program runs."""
        if self._sent:
            self._sent = 0
            if self._bar is not None:
                self._bar.stop()
                self._bar = None
