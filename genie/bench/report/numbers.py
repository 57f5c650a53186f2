"""Figures as text: three digits that mean something, and a unit. None is "n/a"."""

from __future__ import annotations

import math
from datetime import UTC, datetime

ABSENT = "n/a"
#: "does not apply", as against "not known"
DASH = "\N{EN DASH}"
TIMES = "\N{MULTIPLICATION SIGN}"
MINUS = "\N{MINUS SIGN}"
_UNITS = ((1.0, "s"), (1e3, "ms"), (1e6, "\N{MICRO SIGN}s"))


def seconds(value: float | None) -> str:
    if value is None:
        return ABSENT
    factor, unit = next((pair for pair in _UNITS if abs(value) * pair[0] >= 1), _UNITS[-1])
    return f"{_digits(value * factor)} {unit}"


def milliseconds(value: float | None) -> str:
    return ABSENT if value is None else "0" if value == 0 else seconds(value / 1e3)


def times(value: float | None) -> str:
    return ABSENT if value is None else f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f}{TIMES}"


def percent(ratio: float | None) -> str:
    """A ratio as a signed change: 1.05 is +5.0%."""
    return ABSENT if ratio is None else f"{(ratio - 1) * 100:+.1f}%".replace("-", MINUS)


def size(value: float | None) -> str:
    if value is None:
        return ABSENT
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.0f} B" if unit == "B" else f"{_digits(value)} {unit}"
        value /= 1024
    return f"{_digits(value)} GiB"


def joules(value: float | None) -> str:
    return ABSENT if value is None else f"{_digits(value)} J"


def count(value: int | None) -> str:
    return ABSENT if value is None else f"{value:,}".replace(",", "\u202f")


def moment(stamp: str) -> str:
    """An ISO time in UTC, to the minute; whatever else it is, as it is."""
    try:
        when = datetime.fromisoformat(stamp)
    except ValueError:
        return stamp or "unknown time"
    return f"{when.astimezone(UTC):%Y-%m-%d %H:%M} UTC"


def _digits(value: float) -> str:
    if value == 0:
        return "0"
    whole = max(1, 1 + math.floor(math.log10(abs(value))))
    return f"{value:.{max(0, 3 - whole)}f}"
