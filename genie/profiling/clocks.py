"""Another process's clock, told in this one's: measured, never assumed, with a bound of the error.

As in NTP (RFC 5905): the peer reads its clock between a request's departure and its reply's
arrival, so at the middle of the two its clock was ahead by the difference, give or take half of
the round trip. Of several exchanges the shortest is kept. Between one at the start and one at the
end of a profile the offset is interpolated, which takes out a constant difference in rate.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Exchange:
    """One request and its reply; ``sent`` and ``received`` by our clock, ``peer`` by the peer's. ns."""

    sent: int
    peer: int
    received: int

    @property
    def at(self) -> int:
        return (self.sent + self.received) // 2

    @property
    def offset(self) -> int:
        """What the peer's clock was ahead of ours."""
        return self.peer - self.at

    @property
    def error(self) -> int:
        """Half the round trip, rounded up: the true offset lies within ``offset`` +- this."""
        return (self.received - self.sent + 1) // 2


def shortest(exchanges: Iterable[Exchange]) -> Exchange:
    return min(exchanges, key=lambda e: e.received - e.sent)


@dataclass(frozen=True)
class ClockMap:
    """From the peer's clock to ours. Without ``end`` (the peer was lost) drift is not corrected."""

    start: Exchange
    end: Exchange | None = None

    @property
    def error(self) -> int:
        """ns, on what `to_ours` answers for times between the two exchanges."""
        return max(self.start.error, self.end.error) if self.end else self.start.error

    def to_ours(self, peer: int) -> int:
        """Rises with ``peer``, so intervals that nest still nest afterwards."""
        first, last = self.start, self.end
        if last is None or last.peer <= first.peer:
            return peer - first.offset
        elapsed, whole = peer - first.peer, last.peer - first.peer
        return peer - first.offset - (last.offset - first.offset) * elapsed // whole


#: of what runs in this very process
OWN = ClockMap(Exchange(0, 0, 0))
