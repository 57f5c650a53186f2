"""Errors of programs that ran by parts on several servers: which one to tell, and what it is about."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from genie.errors import GenieError, PeerError

#: the number of instructions that no Python line recorded; numbers of instructions in parts of programs count
#: from here, `_STRIDE` for each part, and the first is no part
UNNUMBERED, _STRIDE = 1 << 40, 1 << 20
_MAX_PARTS = 4096


class PartNumbers:
    """The last parts of programs that ran, and which instructions of the whole they are made of."""

    def __init__(self) -> None:
        self._parts: OrderedDict[int, tuple[int, list[int]]] = OrderedDict()
        self._last = 0

    def number(self, first: int, numbers: list[int]) -> int:
        """Where the instructions of a part count from. ``first``: where those of its program do; ``numbers``:
        its own among them."""
        self._last += 1
        number = UNNUMBERED + self._last * _STRIDE
        self._parts[number] = (first, numbers)
        if len(self._parts) > _MAX_PARTS:
            self._parts.popitem(last=False)
        return number

    def trace(self, exc: GenieError) -> None:
        """Makes the instruction that the error names count in the whole program."""
        n = getattr(exc, "instruction", -1)
        if n >= UNNUMBERED:
            start = n - n % _STRIDE
            first, numbers = self._parts.get(start, (-1, []))
            place = n - start
            exc.instruction = first + numbers[place] if place < len(numbers) else -1  # type: ignore[attr-defined]


def first_cause(failures: Sequence[GenieError]) -> GenieError:
    """The one to tell: no mere consequence of another, and the earliest."""

    def rank(exc: GenieError) -> tuple[bool, int, bool]:
        n = getattr(exc, "instruction", -1)
        return isinstance(exc, PeerError), n if n >= 0 else 1 << 62, "could not make it" in str(exc)

    return min(failures, key=rank)
