"""SIGTERM (``timeout``, a cancelled CI job, SLURM's time limit) ends a run of cells as Ctrl-C does.

pytest then tears its fixtures down, so that servers are stopped, and pytest-benchmark saves the finished
cells. The exit status is pytest's own for an interruption, 2.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Generator
from functools import partial
from types import FrameType
from typing import Any

import pytest

from genie.bench.cells import cell_of, is_beside
from genie.bench.session import is_parallel


class EndedBySigterm:
    """A plugin. In runs without cells, and in the parallel sweep, it leaves SIGTERM as it is."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        self._running = False
        self._came = False

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> Generator[None, object, object]:
        ours = not is_parallel(self._config) and any(
            cell_of(item) is not None or is_beside(item) for item in session.items
        )
        if not ours or threading.current_thread() is not threading.main_thread():
            return (yield)
        before = signal.signal(signal.SIGTERM, self._interrupt)
        # Not at the loop's end: what is sent while servers stop and cells are saved must not cut that short.
        # CI systems send SIGINT, and SIGTERM some seconds later.
        self._config.add_cleanup(partial(_handle, before))
        self._running = True
        try:
            return (yield)
        finally:
            self._running = False

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_protocol(self) -> Generator[None, object, object]:
        """An exception raised inside a finalizer is lost: then the run ends with the test."""
        result = yield
        if self._came:
            raise KeyboardInterrupt("SIGTERM")
        return result

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        if self._running and not self._came:
            self._came = True
            raise KeyboardInterrupt("SIGTERM")


def _handle(handler: Any) -> None:
    signal.signal(signal.SIGTERM, handler)
