"""What running a program gave, and how long it took, without making its successor wait."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from genie.server.engines.kv import Value
from genie.wire.messages import ProgramReceipt, Relayout


class Span(Protocol):
    """From before a program's first instruction until its last one is done."""

    #: of `time.perf_counter_ns` when it was started
    start: int

    @property
    def ns(self) -> int:
        """Waits until it is done."""


class HostSpan:
    """The device is synchronised at both ends. Times by `time.perf_counter_ns`."""

    __slots__ = ("_synchronize", "end", "start")

    def __init__(self, synchronize: Callable[[], None]) -> None:
        self._synchronize = synchronize
        synchronize()
        self.start = self.end = time.perf_counter_ns()

    def stop(self) -> None:
        self._synchronize()
        self.end = time.perf_counter_ns()

    @property
    def ns(self) -> int:
        return self.end - self.start


class StreamSpan:
    """By events on the current stream of a GPU: nothing waits until somebody asks."""

    __slots__ = ("_begin", "_end", "_ns", "start")

    def __init__(self) -> None:
        self.start = time.perf_counter_ns()
        self._begin: Any = torch.cuda.Event(enable_timing=True)
        self._end: Any = torch.cuda.Event(enable_timing=True)
        self._ns = -1
        self._begin.record()

    def stop(self) -> None:
        self._end.record()

    @property
    def ns(self) -> int:
        if self._ns < 0:
            self._end.synchronize()
            self._ns = round(self._begin.elapsed_time(self._end) * 1e6)
        return self._ns


@dataclass(slots=True)
class Ran:
    """What running a template once gave."""

    values: Sequence[Value | None]  # the kept ones, in order
    relayouts: list[Relayout]
    span: Span
    cpu_s: float
    counters: dict[str, int] = field(default_factory=dict)


#: makes a program's receipt; waits for the program
LateReceipt = Callable[[], ProgramReceipt]
