"""Counters of a cell: the client's wire counters are gated exactly, all others are shown.

For one client program the requests, their bytes and their round trips are the same in every process.
So any difference between the sides is a change of the protocol or of what is sent, be it more or less,
and has to be accepted by name; and a counter that differs between the processes of one side cannot be
gated at all, which is a finding of its own. What servers and their engines count may depend on timing
(speculation, batching): it is shown only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from genie.bench.results import CellResult

GATED = ("bytes_out", "bytes_in", "round_trips")


@dataclass(frozen=True)
class Change:
    """A gated counter with every value that was seen on each side, sorted; one each when it is stable."""

    counter: str
    old: tuple[int | None, ...]
    new: tuple[int | None, ...]

    @property
    def stable(self) -> bool:
        return len(self.old) == 1 and len(self.new) == 1

    @property
    def better(self) -> bool:
        """Less than before, on both sides the same in every process."""
        old, new = self.old[0], self.new[0]
        return self.stable and old is not None and new is not None and new < old

    def __str__(self) -> str:
        if self.stable:
            return f"{self.counter} {self.old[0]} -> {self.new[0]}" + (" (less)" if self.better else "")
        sides = [f"{name} {_span(values)}" for name, values in (("old", self.old), ("new", self.new))]
        return f"{self.counter} is not deterministic, so it cannot be gated: {', '.join(sides)}"


@dataclass(frozen=True)
class Shown:
    """A counter that is not gated: its medians over the processes of each side."""

    counter: str
    old: float | None
    new: float | None


def gated_changes(old: Sequence[CellResult], new: Sequence[CellResult]) -> tuple[Change, ...]:
    """Counters of one cell that are not one and the same number on both sides."""
    sides = [[_gated(cell) for cell in cells] for cells in (old, new)]
    names = dict.fromkeys(name for side in sides for counters in side for name in counters)
    changes = []
    for name in names:
        seen = [tuple(sorted({one.get(name) for one in side}, key=_order)) for side in sides]
        if len(seen[0]) > 1 or seen[0] != seen[1]:
            changes.append(Change(name, seen[0], seen[1]))
    return tuple(changes)


def shown_counters(old: Sequence[CellResult], new: Sequence[CellResult]) -> tuple[Shown, ...]:
    """Counters of servers, engines and CPU time, of one cell."""
    sides = [[_shown(cell) for cell in cells] for cells in (old, new)]
    names = dict.fromkeys(name for side in sides for counters in side for name in counters)

    def middle(side: Sequence[Mapping[str, float]], name: str) -> float | None:
        values = [counters[name] for counters in side if name in counters]
        return median(values) if values else None

    return tuple(Shown(name, middle(sides[0], name), middle(sides[1], name)) for name in sorted(names))


def _gated(cell: CellResult) -> dict[str, int | None]:
    """Empty where round trips are not counted: the peers, whose bytes are the kernel's.

    A local baseline's counters are zeros, and zero they have to stay.
    """
    wire = cell.info["wire"]
    if wire.get("round_trips") is None:
        return {}
    counters: dict[str, int | None] = {name: wire.get(name) for name in GATED}
    for case, row in (cell.info.get("cases") or {}).items():
        counters |= {f"{name} of {case}": row.get(name) for name in ("bytes_out", "bytes_in")}
    return counters


def _shown(cell: CellResult) -> dict[str, float]:
    counters: dict[str, float | None] = {}
    for side, seconds in (cell.info.get("cpu_s") or {}).items():
        counters[f"{side} CPU s"] = seconds
    counters["peer_bytes"] = cell.info["wire"].get("peer_bytes")
    receipt = cell.info.get("receipt") or {}
    counters |= {name: receipt.get(name) for name in ("ops", "programs")}
    for one in cell.info.get("receipts") or ():
        for name, value in (one.get("counters") or {}).items():
            counters[name] = (counters.get(name) or 0) + value
    return {name: value for name, value in counters.items() if value is not None}


def _order(value: int | None) -> tuple[bool, int]:
    return value is None, value or 0


def _span(values: Sequence[int | None]) -> str:
    return str(values[0]) if len(values) == 1 else f"{values[0]} to {values[-1]} ({len(values)} values)"
