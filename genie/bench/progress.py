"""Where a long run stands: which cell, which phase of it, and about how long it still takes.

On a terminal this is one status line below pytest's own; elsewhere it is a few plain lines. It never
touches a measurement: there is no thread, and a line is written only between two phases or two
rounds, before the next round collects its garbage.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from statistics import fmean
from typing import Any, Protocol

import pytest

SET_UP, PREPARE, COLD, WARM_UP, ROUND, VERIFY = (
    "set-up", "load and upload", "cold request", "warm-up", "round", "verifying",
)  # fmt: skip
#: a status line is redrawn at most this often, but for the first round and the other phases
REDRAW_S = 0.25
#: plain lines inside one cell are at least this far apart
QUIET_S = 20.0
UNTOLD_COLUMNS = 80


class Display(Protocol):
    def begin(self, text: str) -> None:
        """A cell begins, before pytest prints anything of it."""

    def show(self, text: str, boundary: bool) -> None:
        """Inside a cell; ``boundary`` when a phase begins, not only another round of it."""

    def close(self) -> None: ...


class Progress:
    """Told by the measurement what comes next. Shows nothing until a display is given."""

    def __init__(self) -> None:
        self._display: Display | None = None
        self._estimate = Estimate({})
        self._started = 0.0
        self._label: str | None = None
        self._phase = ""
        self._sent = 0

    def start(self, display: Display | None, estimate: Estimate) -> None:
        self._display, self._estimate, self._started = display, estimate, time.monotonic()

    def stop(self) -> None:
        display, self._display, self._label = self._display, None, None
        if display is not None:
            display.close()

    def begin(self, label: str) -> None:
        self._label = label
        if self._display is not None:
            self._display.begin(self._text(""))

    def phase(self, name: str, number: int = 0, of: int = 0) -> None:
        """``name`` begins, or its part ``number`` (from 1) of ``of``. Never call it inside a request."""
        self._phase, self._sent = name, 0
        if self._display is not None and self._label is not None:
            self._display.show(self._text(f"{name} {number} of {of}" if of else name), number <= 1)

    def uploaded(self, nbytes: int) -> None:
        """Some bytes were sent. Shown while a cell is prepared; requests send too, and are timed."""
        if self._phase != PREPARE:
            return
        self._sent += nbytes
        if self._display is not None and self._label is not None:
            self._display.show(self._text(f"{PREPARE}, {self._sent / 1e6:.0f} MB sent"), boundary=False)

    def _text(self, doing: str) -> str:
        now = time.monotonic()
        left = self._estimate.left(now)
        parts = [f"{self._label}: {doing}" if doing else str(self._label)]
        parts.append(f"{_clock(now - self._started)} elapsed")
        if left is not None:
            parts.append(f"about {_rounded(left)} left")
        return ", ".join(parts)


class Estimate:
    """Time left, from what the same cells took last time, else from the mean of this run's.

    Last time's figures are scaled by how this run compares with them so far: it may have more rounds.
    Before the first cell of a run has finished, cells without a figure are taken for average ones.
    """

    def __init__(self, last: Mapping[str, float], ids: Sequence[str] = ()) -> None:
        self._last = last
        self._waiting = dict.fromkeys(ids)
        self._running: tuple[str, float] | None = None
        self.finished: dict[str, float] = {}

    def begin(self, node: str, now: float) -> None:
        self._waiting.pop(node, None)
        self._running = (node, now)

    def end(self, now: float) -> None:
        if self._running is not None:
            node, since = self._running
            self.finished[node] = now - since
            self._running = None

    def left(self, now: float) -> float | None:
        """Seconds; None when nothing is known, or all that was expected is over."""
        both = self.finished.keys() & self._last.keys()
        before = sum(self._last[node] for node in both)
        scale = sum(self.finished[node] for node in both) / before if before else 1.0
        mean = fmean(self.finished.values() or self._last.values() or [0.0])
        total = 0.0
        spent = dict.fromkeys(self._waiting, 0.0)
        if self._running is not None:
            node, since = self._running
            spent[node] = now - since
        for node, seconds in spent.items():
            expected = self._last[node] * scale if node in self._last else mean
            total += max(0.0, expected - seconds)
        return total or None


class LiveLine:
    """One status line under the line that pytest writes, gone before pytest writes again.

    The cursor always rests where pytest left it, so clearing is one "erase to the end of the screen",
    done by the terminal writer's own ``write``. It has a descriptor of its own because pytest points
    the usual ones at its capture files while a test runs.
    """

    def __init__(self, stdout: int, writer: Any) -> None:
        self._fd: int | None = os.dup(stdout)
        self._writer = writer
        self._write = writer.write
        self._shown = False
        self._drawn = 0.0
        writer.write = self._clear_and_write

    def begin(self, text: str) -> None:
        """Nothing: pytest is about to write the name of the test; the first phase follows."""

    def show(self, text: str, boundary: bool) -> None:
        now = time.monotonic()
        if self._fd is None or (not boundary and now - self._drawn < REDRAW_S):
            return
        try:
            # 0 where nobody told the terminal's size: a serial line, some containers.
            columns = os.get_terminal_size(self._fd).columns or UNTOLD_COLUMNS
        except OSError:
            self._lost()
            return
        rows, column = divmod(self._writer.width_of_current_line, columns)
        if rows and not column:
            return  # pytest's line fills its row exactly: terminals differ in where the cursor is then
        shown = " ".join(text.split())
        if len(shown) >= columns:
            shown = shown.replace(" elapsed", "")[: columns - 1]
        self._send(f"\r\n\x1b[2K{shown}\x1b[A\x1b[{column + 1}G")
        self._shown, self._drawn = True, now

    def close(self) -> None:
        self._clear()
        self._writer.write = self._write
        self._lost()

    def _clear_and_write(self, *args: Any, **options: Any) -> None:
        self._clear()
        self._write(*args, **options)

    def _clear(self) -> None:
        if self._shown:
            self._shown = False
            self._send("\x1b[J")

    def _send(self, text: str) -> None:
        if self._fd is None:
            return
        try:
            os.write(self._fd, text.encode("ascii", "replace"))
        except OSError:
            self._lost()

    def _lost(self) -> None:
        """The terminal has gone, or there is no more use for it: the run goes on without a status line."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None


class PlainLines:
    """A line when a cell begins, and one when a cell has said nothing for `QUIET_S` seconds."""

    def __init__(self, config: pytest.Config, reporter: pytest.TerminalReporter) -> None:
        self._capture = config.pluginmanager.get_plugin("capturemanager")
        self._writer: Any = config.get_terminal_writer()
        self._reporter = reporter
        self._last = 0.0

    def begin(self, text: str) -> None:
        self._last = time.monotonic()
        self._new_line()
        # pytest itself begins a new line for the name of the test that follows.
        self._reporter.write(text, flush=True)

    def show(self, text: str, boundary: bool) -> None:
        now = time.monotonic()
        if now - self._last < QUIET_S:
            return
        self._last = now
        with nullcontext() if self._capture is None else self._capture.global_and_fixture_disabled():
            self._new_line()
            self._reporter.write_line(text, flush=True)

    def close(self) -> None: ...

    def _new_line(self) -> None:
        """Also after the bare letter of a test whose name was left behind on an earlier line."""
        self._reporter.ensure_newline()
        if self._writer.width_of_current_line:
            self._writer.line()


def display_for(config: pytest.Config) -> Display | None:
    """A status line where pytest alone writes to a terminal, else plain lines; none of those with ``-q``."""
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    if reporter is None:
        return None
    stdout = _terminal()
    if stdout is not None and not _others_write(config):
        return LiveLine(stdout, config.get_terminal_writer())
    return PlainLines(config, reporter) if config.get_verbosity() >= 0 else None


def _terminal() -> int | None:
    if os.environ.get("TERM", "dumb") == "dumb":
        return None
    try:
        number = sys.stdout.fileno()
    except (AttributeError, OSError, ValueError):  # replaced by something that is no file
        return None
    return number if os.isatty(number) else None


def _others_write(config: pytest.Config) -> bool:
    """Whether tests, logs or a debugger may write to the terminal in the middle of a cell."""
    return bool(
        config.getoption("capture", "no") != "fd"
        or config.getoption("usepdb", False)
        or config.getoption("trace", False)
        or config.getini("log_cli")
        or config.getoption("log_cli_level", None)
        or config.getoption("benchmark_verbose", False)
    )


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _rounded(seconds: float) -> str:
    if seconds < 90:
        return f"{max(1, round(seconds / 5)) * 5} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"
