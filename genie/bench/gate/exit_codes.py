"""Exit statuses of ``genie gate``. Imports nothing heavy: ``--help`` shows them."""

from __future__ import annotations

from enum import IntEnum


class ExitCode(IntEnum):
    """Exit status of ``genie gate``. Of several findings the first of ``WORST_FIRST`` is returned."""

    PASSED = 0
    REGRESSION = 1
    ERROR = 2
    COUNTERS_CHANGED = 3
    MISSING_CELLS = 4
    CANNOT_COMPARE = 5
    INTERRUPTED = 130


WORST_FIRST = (
    ExitCode.CANNOT_COMPARE,
    ExitCode.MISSING_CELLS,
    ExitCode.REGRESSION,
    ExitCode.COUNTERS_CHANGED,
)
EXIT_CODES = {
    ExitCode.PASSED: "passed",
    ExitCode.REGRESSION: "regression: a cell became slower",
    ExitCode.ERROR: "usage or another error",
    ExitCode.COUNTERS_CHANGED: "counters changed: bytes or round trips on the wire",
    ExitCode.MISSING_CELLS: "missing cells: removed, renamed, newly skipped or failed",
    ExitCode.CANNOT_COMPARE: "cannot compare: other machine or work, unreadable results, nothing in common",
    ExitCode.INTERRUPTED: "interrupted",
}
