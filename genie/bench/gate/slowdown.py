"""A pytest plugin that makes one workload slower by a known share of its requests' time.

``-p genie.bench.gate.slowdown --genie-slow-workload llm_decode --genie-slow-share 0.1`` (only in measuring
processes that are meant to be slow) makes the client spin inside the timed span, in all Genie rows of the
workload: after each program whose results the host waited for, share x the time since the last spin, and at
the request's end what is missing. No spin overlaps with a server's work, which would hide it.

What was really added is measured and stored with the results, under KEY:

    workload, asked     as given
    added               by test id: median over its requests of (time spent spinning / all other time)
"""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import wraps
from statistics import median
from typing import Any

import pytest

KEY = "genie_slowdown"


@dataclass
class Slowdown:
    """Spins in the requests of one workload. Times in seconds on the clock of time.perf_counter."""

    workload: str
    share: float
    #: test id -> share added to each of its requests
    added: dict[str, list[float]] = field(default_factory=dict)
    test: str = ""
    _running: bool = False
    _started: float = 0.0
    _since: float = 0.0
    _spun: float = 0.0

    def begin(self) -> None:
        """A request begins, on the clock."""
        self._running, self._spun = True, 0.0
        self._started = self._since = time.perf_counter()

    def program_ran(self) -> None:
        """The host has got what it waited for."""
        if self._running:
            self._spin((time.perf_counter() - self._since) * self.share)

    def end(self) -> None:
        """The request's last moment on the clock."""
        rest = time.perf_counter() - self._started - self._spun
        self._spin(rest * self.share - self._spun)
        self.added.setdefault(self.test, []).append(self._spun / rest)
        self._running = False

    def _spin(self, seconds: float) -> None:
        start = time.perf_counter()
        while time.perf_counter() - start < seconds:
            pass
        self._since = time.perf_counter()
        self._spun += self._since - start

    def report(self) -> dict[str, Any]:
        added = {test: median(shares) for test, shares in self.added.items()}
        return {"workload": self.workload, "asked": self.share, "added": added}


SLOWDOWN = pytest.StashKey[Slowdown]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("genie-slowdown", "Genie: a slow-down on purpose, to measure the gate with")
    group.addoption("--genie-slow-workload", metavar="WORKLOAD", default="llm_decode")
    group.addoption("--genie-slow-share", metavar="SHARE", type=float, default=0.1)


def pytest_configure(config: pytest.Config) -> None:
    slowdown = Slowdown(config.getoption("genie_slow_workload"), config.getoption("genie_slow_share"))
    config.stash[SLOWDOWN] = slowdown


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    """Around the test of a Genie row of the workload; its fixtures are made, its session is not."""
    funcargs: dict[str, Any] = getattr(item, "funcargs", {})
    baseline: Any = funcargs.get("baseline")
    workload: Any = funcargs.get("workload")
    slowdown = item.config.stash[SLOWDOWN]
    if baseline is None or not baseline.name.startswith("genie_") or workload.name != slowdown.workload:
        return (yield)
    slowdown.test = item.nodeid
    with _slowed(baseline, slowdown):
        return (yield)


@contextmanager
def _slowed(baseline: Any, slowdown: Slowdown) -> Iterator[None]:
    """``baseline`` opens slow sessions and has slow requests. Undone at the end: others come after it."""
    from genie.frontend.session import Session

    open_session, run = Session.__init__, baseline.run

    def open_slow_session(session: Session, executor: Any) -> None:
        execute = executor.execute

        @wraps(execute)
        def slow_execute(program: Any, fetch: list[int], describe: list[int]) -> Any:
            outcome = execute(program, fetch, describe)
            if fetch or describe:
                slowdown.program_ran()
            return outcome

        executor.execute = slow_execute
        open_session(session, executor)

    def slow_run(request: Any) -> Any:
        slowdown.begin()
        response = run(request)
        slowdown.end()
        return response

    Session.__init__ = open_slow_session  # type: ignore[method-assign, assignment]
    baseline.run = slow_run
    try:
        yield
    finally:
        Session.__init__ = open_session  # type: ignore[method-assign]
        del baseline.run


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_json(config: pytest.Config, output_json: dict[str, Any]) -> None:
    output_json[KEY] = config.stash[SLOWDOWN].report()


def added_share(raw: Mapping[str, Any]) -> dict[str, float]:
    """By cell, what a stored result (as read from JSON) says was really added; empty without a slow-down."""
    return dict((raw.get(KEY) or {}).get("added") or {})
