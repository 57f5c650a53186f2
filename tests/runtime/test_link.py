"""Accounts of a link: programs that nobody waited for belong to the request that sent them."""

from __future__ import annotations

import pytest
import torch

import genie
from genie.devices import device_slot
from genie.runtime.remote import CHUNK
from genie.runtime.server_process import ServerProcess


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with ServerProcess.start(
        device_slot("cpu", 0), token="link", log_dir=tmp_path_factory.mktemp("logs")
    ) as started:
        yield started


def test_receipts_of_quiet_programs_after_the_last_read_are_not_lost(server):
    with genie.connect(server.address, "link") as session, torch.no_grad():
        link = session.executor.link
        x = torch.ones(4).to("genie")

        def request() -> None:
            assert (x + 1).tolist() == [2, 2, 2, 2]
            y = x
            for _ in range(2 * CHUNK):  # recorded after the read; the chunks leave without a reply
                y = y * 1.5

        request()  # every entry is checked once, with a reply
        session.synchronize()
        for nonce in ("first", "second"):
            link.begin(nonce)
            request()
            out, into, _, server_in, server_out = link.traffic()
            receipts = link.usage.receipts
            assert {r.nonce for r in receipts} == {nonce}
            assert len(receipts) == 3 and sum(r.ops for r in receipts) > CHUNK
            assert (out, into) == (server_in, server_out)
            session.synchronize()


def test_capture_time_is_a_duration_also_when_a_program_starts_with_a_seed(server):
    with genie.connect(server.address, "link") as session:
        session.executor.link.begin("seed")
        torch.manual_seed(0)
        torch.rand(3, device="genie").cpu()
        assert 0 < session.executor.link.timings.capture < 10
