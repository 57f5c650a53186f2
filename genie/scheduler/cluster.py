"""The pool as the scheduler sees it: devices, what they can hold, and what lies between them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from genie.scheduler.nominal import NominalCost
from genie.srg.graph import Node


class CostModel(Protocol):
    """Predicts what nodes cost on one device."""

    def seconds(self, nodes: Sequence[Node], share: float = 1.0) -> list[float]:
        """Execution seconds of each node, with ``share`` of its FLOPs and bytes (a part of a batch);
        launch overhead included, views 0."""


@dataclass(frozen=True)
class Link:
    """``rtt_s``: round trip of an empty message; ``bytes_per_s``: one way, of a large one."""

    rtt_s: float
    bytes_per_s: float

    def seconds(self, nbytes: int) -> float:
        """One way: half a round trip, then the bytes."""
        return self.rtt_s / 2 + nbytes / self.bytes_per_s


#: stands where nothing was measured: that two reach each other. Nothing is predicted with it, see
#: `Cluster.nominal`
NOMINAL_LINK = Link(2e-4, 1e9)


@dataclass(frozen=True)
class Device:
    """One server. ``memory_limit`` in bytes, 0 = none known; ``held_bytes``: what is taken of it.

    ``busy_s``: predicted seconds of work that it has been given and has not done. ``client``: the
    link between it and the client.
    """

    index: int
    name: str
    cost: CostModel
    client: Link
    memory_limit: int = 0
    held_bytes: int = 0
    busy_s: float = 0.0


@dataclass(frozen=True)
class Cluster:
    """``peer``: the link between any two servers, None where they cannot reach each other (then no value
    may move between them). ``home``: the server that has the session's random state.

    What a prediction adds to execution and links (measured on CPU hosts, with Python at both ends):
    ``segment_s`` for each run of instructions that a server starts, after a message or after waiting for a
    value; ``transfer_s`` for each transfer, at both its ends; ``copy_bytes_per_s`` while a value is copied
    into or out of the buffers of a connection, which also keeps both ends from computing.
    """

    devices: tuple[Device, ...]
    peer: Link | None
    home: int = 0
    segment_s: float = 150e-6
    transfer_s: float = 150e-6
    copy_bytes_per_s: float = 5e9

    @property
    def nominal(self) -> bool:
        """No cost model is used: then links and messages cost nothing either."""
        return all(isinstance(d.cost, NominalCost) for d in self.devices)
