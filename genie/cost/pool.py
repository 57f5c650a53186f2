"""Everything that the scheduler predicts a pool with: its devices, and the links between all of them."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from genie.cost.calibrate import Progress, load_or_calibrate
from genie.cost.links import client_link, peer_link
from genie.errors import PeerError, ServerLostError
from genie.runtime.link import ServerLink
from genie.runtime.open_pool import PoolCosts
from genie.runtime.peers import PeerGroup
from genie.runtime.remote import open_link
from genie.scheduler.cluster import CostModel, Link

logger = logging.getLogger(__name__)

JOIN_TIMEOUT_S = 30.0


def pool_costs(
    addresses: Sequence[str],
    token: str | None = None,
    *,
    tls_ca: str | None = None,
    models: Sequence[CostModel] | None = None,
    join_timeout_s: float = JOIN_TIMEOUT_S,
    progress: Progress | None = None,
) -> PoolCosts:
    """Models of the devices (``models``, one for each; else measured where none is stored: seconds), and
    measured links (always: a fraction of a second). The slowest of the pairs stands for what is between any
    two servers. Servers that have not joined in a group after ``join_timeout_s`` cannot reach each other.

    Raises ConnectError, AuthError, ConfigError, ServerLostError.
    """
    if models is None:
        models = load_or_calibrate(addresses, token, tls_ca=tls_ca, progress=progress)
    links: list[ServerLink] = []
    try:
        for address in addresses:
            links.append(open_link(address, token, tls_ca=tls_ca))
        clients = tuple(client_link(link.connection) for link in links)
        return PoolCosts(tuple(models), clients, between_servers(links, join_timeout_s))
    finally:
        for link in links:
            link.close()


def between_servers(links: Sequence[ServerLink], join_timeout_s: float) -> Link | None:
    """The slowest of the pairs; None where they cannot reach each other. Raises ServerLostError."""
    if len(links) < 2:
        return None
    group = PeerGroup(join_timeout_s)
    try:
        group.require(links)
        # A ring: each server sends once and receives once.
        ring = zip(links, [*links[1:], links[0]], strict=True)
        found = [peer_link(a.connection, b.connection, (group.rank(a), group.rank(b))) for a, b in ring]
    except PeerError as exc:
        for link in links:
            if isinstance(link.connection.lost, ServerLostError):
                raise link.connection.lost from exc
        logger.warning("the servers cannot reach each other, so nothing will move between them: %s", exc)
        return None
    return Link(max(f.rtt_s for f in found), min(f.bytes_per_s for f in found))
