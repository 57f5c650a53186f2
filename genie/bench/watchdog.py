"""No cell waits for ever: a server that is alive but silent fails its cell within a stated time.

A blocked ``recv`` gives the interpreter no chance to look at a clock, so a second thread looks, and
signals the main thread: the handler's exception ends the system call (PEP 475). SIGALRM is left to
pytest-timeout. The peers have time limits of their own, shorter than these, with better messages.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType

from genie.errors import ServerLostError

PREPARE_S = 360.0
REQUEST_S = 180.0
#: one look a second is too rare to be seen in any figure
LOOK_S = 1.0


class Watchdog:
    """``with Watchdog(where) as watchdog: with watchdog.limit(s, "run"): ...`` in the main thread.

    In any other thread nothing can be interrupted, and nothing is.
    """

    def __init__(self, where: str) -> None:
        self._where = where
        self._due: float | None = None
        self._message = ""
        self._done = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Watchdog:
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGUSR2, self._interrupt)
            self._thread = threading.Thread(target=self._watch, name="genie-watchdog", daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._thread is not None:
            self._done.set()
            self._thread.join()
            signal.signal(signal.SIGUSR2, self._before)

    @contextmanager
    def limit(self, seconds: float, doing: str) -> Iterator[None]:
        """Raises ServerLostError in the middle of the block once it has taken ``seconds``."""
        self._message = (
            f"{self._where}: {doing} got no answer within {seconds:.0f} s: a server hangs, or is far too "
            "slow; look at its log, stop it and start the run again"
        )
        self._due = time.monotonic() + seconds
        try:
            yield
        finally:
            self._due = None

    def _watch(self) -> None:
        main = threading.main_thread().ident
        assert main is not None
        while not self._done.wait(LOOK_S):
            if self._overdue():
                # Again at each look: an exception raised inside a finalizer is lost.
                signal.pthread_kill(main, signal.SIGUSR2)

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        if self._overdue():
            raise ServerLostError(self._message)

    def _overdue(self) -> bool:
        due = self._due
        return due is not None and time.monotonic() > due
