"""A pool that works together over a network: servers on two hosts, the client on a third.

What is between the two servers is a cable of its own, so its bytes are those of tensors that moved from
server to server, and it can be slow or cut while the client still reaches both.
"""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

import genie
from genie.config import POOL_FEATURES
from genie.cost.pool import pool_costs
from genie.errors import AuthError, ConnectError, PeerError
from genie.frontend.session import Session
from genie.runtime.open_pool import PoolCosts, open_pool, policies_of
from genie.runtime.pool import PoolExecutor
from genie.runtime.remote import open_link
from genie.scheduler.forced import Forced
from genie.scheduler.plan import Plan
from genie.srg.cost import COMPUTE
from genie.srg.graph import Node
from tests.frontend import models
from tests.launch.processes import TOKEN, computes

pytestmark = pytest.mark.timeout(240)

IDS = torch.randint(3, 512, (4, 9), generator=torch.Generator().manual_seed(5))
PIXELS = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(6))


def test_its_addresses_are_those_of_the_hosts(across):
    assert [each.rpartition(":")[0] for each in across.pool.addresses] == [h.address for h in across.hosts]
    assert list(across.pool.pids) == across.pids


def test_clients_on_any_host_reach_it_with_the_token(across):
    first, second = across.pool.addresses
    assert computes(first, tls_ca=across.certificate) == across.pids[0]
    with across.hosts[0].entered():
        assert computes(second, tls_ca=across.certificate) == across.pids[1]
        with pytest.raises(ConnectError):
            genie.connect(f"127.0.0.1:{first.rpartition(':')[2]}", TOKEN, tls_ca=across.certificate)
    with pytest.raises(AuthError):
        genie.connect(first, "another token", tls_ca=across.certificate)


Request = Callable[[nn.Module, str], Tensor]
SPLITS: dict[str, tuple[str, Callable[[], nn.Module], Request]] = {
    "prefill": ("2 shards", models.gpt2, lambda m, device: m(IDS.to(device)).logits),
    "branches": (
        "2 towers",
        models.clip,
        lambda m, device: m(pixel_values=PIXELS.to(device), input_ids=IDS.to(device)).logits_per_image,
    ),
}


@pytest.mark.parametrize("policy", SPLITS)
@torch.no_grad()
def test_a_split_request_equals_the_local_one(across, policy):
    label, build, request = SPLITS[policy]
    model = build()
    expected = request(model, "cpu")
    forced = Forced(policies_of(POOL_FEATURES), policy, label)
    carried = across.cable.carried()
    with genie.connect(
        across.pool.addresses, TOKEN, tls_ca=across.certificate, policies=[forced], calibrate=False
    ) as session:
        there = copy.deepcopy(model).to("genie")
        for _ in range(3):
            torch.testing.assert_close(request(there, "genie").cpu(), expected, rtol=1e-4, atol=1e-5)
        plan = session.executor.followed[-1]
        assert (plan.placement.policy, plan.servers) == (policy, (0, 1))
        counted = [link.counters() for link in session.executor.links]
    assert counted[0].peer_out == counted[1].peer_in > 0
    assert counted[1].peer_out == counted[0].peer_in
    for before, after, server in zip(carried, across.cable.carried(), counted, strict=True):
        assert after - before >= server.peer_out, "tensors went another way than --peer-host says"


class PerProduct:
    """Matrix products take ``PRODUCT_S``, and nothing else takes time: then only the links decide."""

    PRODUCT_S = 0.05

    def seconds(self, nodes: Sequence[Node], share: float = 1.0) -> list[float]:
        return [self.PRODUCT_S * share if node.name in COMPUTE else 0.0 for node in nodes]


class Towers(nn.Module):
    """Each tower makes 8 MB, which have to be together for what follows."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = (nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 2048)) for _ in "ab")

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return (self.a(x) * self.b(y)).sum(-1)


X, Y = torch.randn(2, 1024, 32, generator=torch.Generator().manual_seed(7))


def measured(across, **options) -> PoolCosts:
    models = [PerProduct(), PerProduct()]
    return pool_costs(across.pool.addresses, TOKEN, tls_ca=across.certificate, models=models, **options)


@contextmanager
def pool_of(across, **options) -> Iterator[PoolExecutor]:
    links = [open_link(each, TOKEN, tls_ca=across.certificate) for each in across.pool.addresses]
    with Session(open_pool(links, **options)) as session:
        yield session.executor


@torch.no_grad()
def towers_plan(across, costs: PoolCosts) -> Plan:
    """The plan that is followed once layouts are known; the results are those of this machine."""
    model = Towers()
    with pool_of(across, costs=costs) as pool:
        there = copy.deepcopy(model).to("genie")
        for _ in range(2):
            torch.testing.assert_close(there(X.to("genie"), Y.to("genie")).cpu(), model(X, Y))
        return pool.followed[-1]


def test_a_slow_network_is_measured_and_keeps_a_plan_on_one_server(across):
    fast = measured(across)
    assert fast.peer is not None
    plan = towers_plan(across, fast)
    assert (plan.placement.policy, plan.servers) == ("branches", (0, 1))

    limit = 25e6  # 8 MB then take longer than a tower, also if half the time is measured
    with across.cable.limited(limit):
        slow = measured(across)
        assert slow.peer is not None and limit / 2 < slow.peer.bytes_per_s < limit * 2 < fast.peer.bytes_per_s
        plan = towers_plan(across, slow)
    assert len(plan.servers) == 1
    (reason,) = (each for each in plan.considered if each.policy == "branches")
    assert "takes longer" in reason.why
    assert reason.predicted_s > plan.predicted_s > 4 * PerProduct.PRODUCT_S


def test_servers_that_do_not_reach_each_other_work_alone(across, caplog):
    with across.cable.cut():
        started = time.monotonic()
        with caplog.at_level(logging.WARNING, "genie.cost.pool"):
            costs = measured(across, join_timeout_s=2.0)
        assert time.monotonic() - started < 20
        assert costs.peer is None and len(costs.clients) == 2
        assert "cannot reach each other" in caplog.text
        plan = towers_plan(across, costs)
        assert len(plan.servers) == 1
        (reason,) = (each for each in plan.considered if each.policy == "branches")
        assert "cannot reach each other" in reason.why


@torch.no_grad()
def test_a_network_that_fails_under_a_session_ends_its_transfers(across):
    model = Towers()
    forced = Forced(policies_of(POOL_FEATURES), "branches", "2 towers")
    with pool_of(across, policies=[forced], peer_timeout_s=2.0) as pool:
        there = copy.deepcopy(model).to("genie")
        for _ in range(2):
            there(X.to("genie"), Y.to("genie")).cpu()
        assert pool.followed[-1].servers == (0, 1)
        with across.cable.cut():
            started = time.monotonic()
            with pytest.raises(PeerError, match="did not take part in a transfer"):
                there(X.to("genie"), Y.to("genie")).cpu()
            assert time.monotonic() - started < 30
    assert computes(across.pool.addresses[0], tls_ca=across.certificate) == across.pids[0]
