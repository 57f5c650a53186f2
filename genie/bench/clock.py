"""The timer of every cell and link benchmark: a stopwatch that runs only while a request does.

A round of the microbenchmark is many requests, and each needs its inputs made before it and its
receipts fetched after it. The stopwatch stands still meanwhile, so that the figure which
pytest-benchmark records for a round is exactly the sum of the wall-clock times of its requests.
"""

from __future__ import annotations

_counted = 0.0


def cell_clock() -> float:
    """Seconds spent inside requests so far, in this process (a pytest-benchmark timer)."""
    return _counted


def count(seconds: float) -> None:
    """Add the wall-clock time of one request."""
    global _counted
    _counted += seconds
