"""Accounts of a link: programs that nobody waited for belong to the request that sent them."""

from __future__ import annotations

import pytest
import torch

import genie
from genie.devices import device_slot
from genie.errors import ConfigError, ProtocolError, RemoteOpError
from genie.runtime.connection import Connection
from genie.runtime.link import ServerLink
from genie.runtime.remote import CHUNK, ResidentExecutor
from genie.runtime.server_process import ServerProcess
from genie.wire.messages import Counters


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


def connected(server, max_templates: int = 1024, chunk: int = CHUNK) -> genie.Session:
    executor = ResidentExecutor(ServerLink(Connection.connect(server.address, "link"), max_templates))
    executor.chunk = chunk
    return genie.Session(executor).activate()


def different(x: torch.Tensor, kind: int) -> torch.Tensor:
    """A program of its own for each ``kind``."""
    for _ in range(1 + kind):
        x = x * 3 - 1
    return x.relu() if kind % 2 else x


def spied(link: ServerLink, requests: list) -> None:
    send = link.send

    def keep(request, buffers):
        requests.append(request)
        send(request, buffers)

    link.send = keep


def test_programs_over_the_bound_are_evicted_and_sent_again(server):
    requests: list = []
    with connected(server, max_templates=2) as session, torch.no_grad():
        link = session.executor.link
        spied(link, requests)
        x, host = torch.ones(4).to("genie"), torch.ones(4)
        for _ in range(3):
            for kind in range(4):
                assert torch.equal(different(x, kind).cpu(), different(host, kind))
        for _ in range(3):
            assert torch.equal(different(x, 3).cpu(), different(host, 3))
        assert link.connection.request(Counters())[0].templates == 2
    sent = [r.body is not None for r in requests if r.template >= 0]
    assert sent == [True] * 12 + [False] * 3
    defined = [d.op for r in requests if r.body for d in r.body.defs]
    assert len(defined) == len(set(defined)), "op definitions outlive the templates that brought them"


def test_templates_overflow_while_programs_are_quiet(server):
    def work(x):
        for kind in (0, 1, 2, 3, 4, 0, 1):
            x = different(x, kind) * 0.01
        return x

    with connected(server, max_templates=2, chunk=3) as session, torch.no_grad():
        link = session.executor.link
        x, host = torch.ones(4).to("genie"), torch.ones(4)
        for k in range(4):
            link.begin(f"n{k}")
            torch.testing.assert_close(work(x).cpu(), work(host))
            out, into, trips, server_in, server_out = link.traffic()
            receipts = link.usage.receipts
            assert {r.nonce for r in receipts} == {f"n{k}"}
            assert sum(r.ops for r in receipts) == 46 and len(receipts) >= 15
            assert all(len(r.digest) == 32 for r in receipts if r.ops)
            assert {(r.pid, r.device) for r in receipts} == {(server.pid, link.connection.welcome.device)}
            assert (out, into) == (server_in, server_out)
        assert trips == 1
        assert link.connection.request(Counters())[0].templates == 2


def test_the_smaller_bound_of_the_two_ends_holds(server):
    with connected(server, max_templates=10**6) as session:
        link = session.executor.link
        assert link.max_templates == link.connection.welcome.max_templates == 4096
    with pytest.raises(ConfigError, match="one template at least"):
        connected(server, max_templates=0)


def test_equal_layers_are_predicted_each_on_its_own(server):
    with connected(server, chunk=2) as session, torch.no_grad():
        link = session.executor.link
        weights = [torch.full((4,), float(k)).to("genie") for k in range(12)]

        def request():
            link.begin("layers")
            x = weights[0]
            for w in weights:
                x = x * w + 1
            x.cpu()
            return link.traffic()[0]

        first, *_, last = (request() for _ in range(5))
        assert len(link.usage.receipts) == 13
        assert last < 13 * 80 < first


def test_a_request_too_long_to_leave_is_forgotten(server, monkeypatch):
    with connected(server), torch.no_grad():
        x, host = torch.ones(4).to("genie"), torch.ones(4)
        for kind in (0, 1):  # with a template and without one at the server
            if kind == 0:
                different(x, kind).cpu()
            y = different(x, kind)
            with monkeypatch.context() as patch:
                patch.setattr("genie.wire.framing.MAX_HEADER", 10)
                with pytest.raises(ProtocolError, match="split the request"):
                    y.cpu()
            for _ in range(3):
                assert torch.equal(different(x, kind).cpu(), different(host, kind))


def test_a_failed_program_leaves_both_ends_in_step(server):
    with connected(server) as session, torch.no_grad():
        link = session.executor.link
        table = torch.arange(8.0).to("genie")

        def pick(*indices):
            return (table[torch.tensor(indices).to("genie")] * 2).tolist()

        for _ in range(3):
            assert pick(1, 2) == [2, 4]
        with pytest.raises(RemoteOpError, match="index"):
            pick(1, 99)
        requests: list = []
        spied(link, requests)
        assert pick(3, 4) == [6, 8]
        assert requests[-1].body is None
