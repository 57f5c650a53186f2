"""What a scheduler decides: for each instruction of a window the servers that run it.

A *window* is what a client records between two reads, merged into one graph (`genie.srg`). A plan
places each instruction on one server, or on several: then each of those runs it on its rows of the
batch (values with an axis in `BatchSplit.axes`), or on equal copies (all other values).

Which values must move follows from the placement; `transfers` names each once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import msgspec

from genie.scheduler.where import Axis, Shard


@dataclass(frozen=True)
class BatchAxes:
    """Proof that a graph can run on some rows of a batch: every result is the same rows of the whole.

    ``size``: rows. ``axes``: the axis of each value (externals included) that has the batch; all others
    do not depend on it. ``literals``: for an instruction, the positions among its ``literals`` that hold a
    size of the batch, with the factor: for r rows the literal is ``r * inner``.

    ``local``: values that mean something only to the part that made them, so they neither move nor are
    joined, and none leaves: numbers of rows (``arange(B)`` as an index; each part counts its own from 0),
    and sums over all rows that nothing uses.
    """

    size: int
    axes: Mapping[int, Axis]
    literals: Mapping[int, tuple[tuple[int, int], ...]]
    local: frozenset[int] = frozenset()


@dataclass(frozen=True)
class BatchSplit:
    """``shards`` are in order of rows, without gaps, each on another server."""

    batch: BatchAxes
    shards: tuple[Shard, ...]


@dataclass(frozen=True)
class Placement:
    """A policy's proposal. ``servers``: for each instruction those that run it, ascending."""

    policy: str
    servers: tuple[tuple[int, ...], ...]
    why: str
    split: BatchSplit | None = None
    label: str = ""  # tells apart the proposals of one policy, as in "2 stages"


@dataclass(frozen=True)
class Declined:
    """A policy found nothing to propose, or its proposal would not pay."""

    policy: str
    why: str
    label: str = ""
    predicted_s: float | None = None


class Transfer(msgspec.Struct, frozen=True, gc=False):
    """``value`` moves from server ``source`` (-1: the client) to ``target`` before instruction ``before``
    runs there. ``kind``: "copy" of the whole, "scatter" of the target's rows of a whole value, "gather" of
    the source's rows to where all are needed. ``once``: a weight, which stays for later windows. ``after``:
    the instruction on ``source`` that makes the value, or is the last to write to its memory; -1: none does.
    """

    # A struct, since each candidate of a large model has a thousand of them.

    value: int
    source: int
    target: int
    nbytes: int
    before: int
    kind: str = "copy"
    once: bool = False
    after: int = -1


@dataclass(frozen=True)
class Plan:
    """``predicted_s``: from the first message until the last result is ready on a server, without what
    moves ``once``; None where no cost model was used. ``join_s``: what the next window will take to join the
    state that this one leaves in shards. ``considered``: all that was not chosen."""

    placement: Placement
    transfers: tuple[Transfer, ...]
    predicted_s: float | None = None
    busy_s: tuple[float, ...] = ()  # predicted execution seconds by server
    considered: tuple[Declined, ...] = ()
    notes: tuple[str, ...] = field(default=())
    join_s: float = 0.0

    @property
    def servers(self) -> tuple[int, ...]:
        """Those that take part, ascending."""
        return tuple(sorted({s for servers in self.placement.servers for s in servers}))
