"""Measured links: to a server, and between two."""

from __future__ import annotations

from genie.cost.links import client_link, join, peer_link
from genie.runtime.connection import Connection
from tests.cost.test_calibrate import TOKEN, servers

__all__ = ["servers"]


def test_the_link_to_a_server(servers):
    with Connection.connect(servers[0].address, TOKEN) as connection:
        link = client_link(connection)
    assert 1e-6 < link.rtt_s < 0.1
    assert 1e7 < link.bytes_per_s < 1e12
    assert link.seconds(0) == link.rtt_s / 2


def test_the_link_between_two_servers(servers):
    with (
        Connection.connect(servers[0].address, TOKEN) as a,
        Connection.connect(servers[1].address, TOKEN) as b,
    ):
        join([a, b])
        for source, target, ranks in ((a, b, (0, 1)), (b, a, (1, 0))):
            link = peer_link(source, target, ranks)
            assert 1e-7 < link.rtt_s < 0.1
            assert 1e7 < link.bytes_per_s < 1e12
