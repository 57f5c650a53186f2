"""Measured links: to a server, and between two."""

from __future__ import annotations

from contextlib import closing

import pytest

from genie.cost.links import client_link, peer_link
from genie.cost.pool import between_servers
from genie.devices import device_slot
from genie.errors import ServerLostError
from genie.runtime.connection import Connection
from genie.runtime.peers import PeerGroup
from genie.runtime.remote import open_link
from genie.runtime.server_process import ServerProcess
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
        closing(open_link(servers[0].address, TOKEN)) as a,
        closing(open_link(servers[1].address, TOKEN)) as b,
    ):
        group = PeerGroup(timeout_s=30)
        group.require([a, b])
        for source, target in ((a, b), (b, a)):
            ranks = group.rank(source), group.rank(target)
            link = peer_link(source.connection, target.connection, ranks)
            assert 1e-7 < link.rtt_s < 0.1
            assert 1e7 < link.bytes_per_s < 1e12


def test_a_server_that_ended_is_not_taken_for_one_out_of_reach(servers, tmp_path):
    with (
        ServerProcess.start(device_slot("cpu", 0), token=TOKEN, log_dir=tmp_path) as third,
        closing(open_link(servers[0].address, TOKEN)) as a,
        closing(open_link(third.address, TOKEN)) as b,
    ):
        third.close()
        with pytest.raises(ServerLostError):
            between_servers([a, b], join_timeout_s=2.0)
