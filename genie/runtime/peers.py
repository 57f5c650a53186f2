"""The client's side of a group of servers among which tensors can move."""

from __future__ import annotations

from collections.abc import Sequence

from genie.errors import GenieError, PeerError
from genie.runtime.link import ServerLink
from genie.wire.messages import PeerAddress, PeerJoin, PeerJoined, PeerListen

#: for joining, and for each transfer
TIMEOUT_S = 60.0


class PeerGroup:
    """Made when the first tensor moves; made anew when the servers have changed."""

    def __init__(self, timeout_s: float = TIMEOUT_S) -> None:
        self.timeout_s = timeout_s
        self._members: list[ServerLink] = []
        self._formed = False

    def dissolve(self) -> None:
        """The servers have changed: the next transfer makes the group anew."""
        self._members = []

    def rank(self, link: ServerLink) -> int:
        """The server's number in the group."""
        return self._members.index(link)

    def require(self, links: Sequence[ServerLink]) -> None:
        """The servers' ranks are their places among ``links``. Raises PeerError, ServerLostError."""
        if self._members:
            return
        if self._formed:
            # What is on its way through the old group would be lost with it.
            for link in links:
                link.counters()
        self._formed = True
        address, _ = links[0].connection.request(PeerListen())
        assert isinstance(address, PeerAddress)
        failure: GenieError | None = None
        asked = []
        for rank, link in enumerate(links):
            try:
                link.connection.send(PeerJoin(address.host, address.port, rank, len(links), self.timeout_s))
                asked.append(link)
            except GenieError as exc:
                failure = failure or exc
        for link in asked:
            # All are heard, whatever one says: an answer left unread would be taken for another's.
            try:
                joined, _ = link.connection.receive()
                assert isinstance(joined, PeerJoined)
            except GenieError as exc:
                failure = failure or exc
        if failure is not None:
            raise (
                failure
                if isinstance(failure, PeerError)
                else PeerError(f"the servers could not form a group to exchange tensors: {failure}")
            )
        self._members = list(links)
