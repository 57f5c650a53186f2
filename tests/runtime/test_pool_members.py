"""Servers that come, go, and are too small."""

from __future__ import annotations

import os
import signal
import statistics
import threading
import time
from contextlib import closing

import pytest
import torch
from torch import Tensor, nn

from genie.devices import device_slot
from genie.errors import ConfigError, ServerLostError
from genie.runtime.pool import PoolExecutor
from genie.runtime.remote import open_link
from genie.runtime.server_process import start_servers
from genie.scheduler.cluster import Link
from genie.scheduler.nominal import NominalCost
from genie.scheduler.policies import BUILT_IN
from tests.runtime.pools import TOKEN, Alternate, Home, Rows, executor, placed, pooled


def _servers(tmp_path, n: int, **options):
    return start_servers(
        [device_slot("cpu", k % 2) for k in range(n)], token=TOKEN, log_dir=tmp_path, **options
    )


def _noise(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _kill(server) -> None:
    os.kill(server.pid, signal.SIGKILL)


@torch.no_grad()
def test_a_server_that_is_killed_in_the_middle_of_a_plan(tmp_path) -> None:
    """Server 0 waits for a tensor of the one that dies: the error names the lost server, soon; what the
    others hold is still there, and the session goes on with them."""
    servers = _servers(tmp_path, 3)
    try:
        with pooled(servers, Alternate(1)) as pool:
            model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU()).to("genie")
            x = _noise(4, 32)
            expected = model(x.to("genie")).cpu()
            home = pool.members.home
            kept = x.to("genie") @ x.t().to("genie")
            pool.policies[:] = [Home(home)]
            torch.testing.assert_close(kept.cpu(), x @ x.t())
            pool.policies[:] = [Alternate(1)]
            for _ in range(2):
                torch.testing.assert_close(model(x.to("genie")).cpu(), expected)
            victim = (home + 1) % 3
            started = time.monotonic()
            timer = threading.Timer(0.2, _kill, [servers[victim]])
            timer.start()
            with pytest.raises(ServerLostError):
                while time.monotonic() - started < 30:
                    torch.testing.assert_close(model(x.to("genie")).cpu(), expected)
            assert time.monotonic() - started < 25
            timer.join(5)
            torch.testing.assert_close(kept.cpu(), x @ x.t())
            for _ in range(3):
                torch.testing.assert_close(model(x.to("genie")).cpu(), expected)
            assert victim not in pool.alive
            assert pool.explained[-1].plan.servers == (0, 1)  # of those that are left
    finally:
        for server in servers:
            server.close()


@torch.no_grad()
def test_weights_that_only_the_lost_server_had(tmp_path) -> None:
    servers = _servers(tmp_path, 2)
    try:
        with pooled(servers, Home()) as pool:
            layer = nn.Linear(8, 8).to("genie")
            x = _noise(2, 8)
            layer(x.to("genie")).cpu()
            torch.manual_seed(3)
            torch.rand(4, device="genie").cpu()
            _kill(servers[pool.members.home])
            for _ in range(2):
                with pytest.raises(ServerLostError):
                    layer(x.to("genie")).cpu()
            with pytest.raises(ServerLostError, match="load the model again"):
                layer.weight.cpu()
            with pytest.raises(ServerLostError, match="manual_seed"):
                torch.rand(4, device="genie").cpu()
            torch.manual_seed(3)
            assert torch.rand(4, device="genie").cpu().shape == (4,)
            again = nn.Linear(8, 8)
            expected = again(x)
            torch.testing.assert_close(again.to("genie")(x.to("genie")).cpu(), expected)
    finally:
        for server in servers:
            server.close()


@torch.no_grad()
def test_a_server_that_joins_late_is_used(trio) -> None:
    with pooled(trio[:2], Rows(2, 2)) as pool:
        model = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 16)).to("genie")
        x = _noise(4, 16)
        expected = [model(x.to("genie")).cpu() for _ in range(3)][-1]
        state = model(x.to("genie"))  # by rows, on the first two
        pool.policies[:] = [Rows(1, 2, 1)]
        pool.add(open_link(trio[2].address, TOKEN))
        torch.testing.assert_close(state.cpu(), expected)
        for _ in range(3):
            torch.testing.assert_close(model(x.to("genie")).cpu(), expected)
        assert pool.explained[-1].plan.servers == (0, 1, 2)
        assert pool.links[2].counters().peer_in > 0


def test_a_calibrated_pool_takes_no_invented_figures(trio) -> None:
    """Nor does another mix them with its own: what is predicted is predicted from measurements only."""
    client = Link(1e-5, 1e10)
    calibrated = {"costs": [_Slow()], "client_links": [client]}
    with pooled(trio[:1], Home(), **calibrated) as pool, closing(open_link(trio[1].address, TOKEN)) as late:
        for given in ({}, {"cost": _Slow()}, {"client": client}):
            with pytest.raises(ConfigError, match="client_link"):
                pool.add(late, **given)
        assert pool.alive == [0]
        pool.add(late, cost=_Slow(), client=client)
        pool.members.require_home()
        devices = pool.members.cluster().devices
        assert [d.client for d in devices] == [client] * 2
        assert all(isinstance(d.cost, _Slow) for d in devices)
    with pooled(trio[:1], Home()) as pool, closing(open_link(trio[1].address, TOKEN)) as late:
        for given in ({"cost": _Slow()}, {"client": client}):
            with pytest.raises(ConfigError, match="without a cost model"):
                pool.add(late, **given)
    for incomplete in (
        {"costs": [_Slow()]},
        {"client_links": [client]},
        {**calibrated, "costs": [_Slow()] * 2},
    ):
        with (
            closing(open_link(trio[0].address, TOKEN)) as link,
            pytest.raises(ConfigError, match="for each"),
        ):
            PoolExecutor([link], [Home()], **incomplete)


MEGABYTE = 1 << 20


@torch.no_grad()
def test_weights_that_fit_on_no_single_server(tmp_path) -> None:
    """12 layers of 1 MB, on servers that hold 10 MB each: uploads spill over, and the stages run where the
    weights are."""
    servers = _servers(tmp_path, 2, extra_args=["--memory-limit", str(10 * MEGABYTE)])
    try:
        torch.manual_seed(0)
        layers = [nn.Linear(512, 512, bias=False) for _ in range(12)]
        model = nn.Sequential(*(m for layer in layers for m in (layer, nn.ReLU()))).eval()
        x = _noise(8, 512)
        expected = model(x)
        with pooled(servers, *(policy() for policy in BUILT_IN.values())) as pool:
            model.to("genie")
            for _ in range(3):
                torch.testing.assert_close(model(x.to("genie")).cpu(), expected, rtol=1e-4, atol=1e-5)
            held = [link.counters().held_bytes for link in pool.links]
            assert all(4 * MEGABYTE <= h <= 10 * MEGABYTE for h in held), held
            assert pool.explained[-1].plan.servers == (0, 1)
    finally:
        for server in servers:
            server.close()


class _Slow(NominalCost):
    FLOPS_PER_S = NominalCost.FLOPS_PER_S / 4
    BYTES_PER_S = NominalCost.BYTES_PER_S / 4


@torch.no_grad()
def test_unequal_devices_get_unequal_shares(trio) -> None:
    policies = [policy() for name, policy in BUILT_IN.items() if name == "phases"]
    client = Link(1e-5, 1e10)
    with pooled(
        trio[:2], *policies, *(p() for n, p in BUILT_IN.items() if n == "colocation"),
        costs=[NominalCost(), _Slow()], client_links=[client, client],
    ) as pool:  # fmt: skip
        from tests.frontend import models

        model = models.gpt2()
        ids = torch.randint(3, 512, (5, 64), generator=torch.Generator().manual_seed(1))
        expected = model(ids, use_cache=False).logits
        model.to("genie")
        for _ in range(3):
            got = model(ids.to("genie"), use_cache=False).logits.cpu()
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
        split = pool.explained[-1].plan.placement.split
        assert split is not None, pool.explained[-1].plan.considered
        assert [s.rows for s in split.shards] == [4, 1]


class _Turns:
    """The programs of a window on one server after the other."""

    name = "turns"

    def propose(self, problem):
        ends = [*problem.calls[1:], len(problem.graph.nodes)]
        wish: list = []
        for k, (start, end) in enumerate(zip(problem.calls, ends, strict=True)):
            wish += [(k % len(problem.cluster.devices),)] * (end - start)
        return [placed(problem, self.name, wish)]


@torch.no_grad()
def test_nothing_waits_where_nothing_is_read(trio) -> None:
    """Two servers with a core each work at the same time, though one thread feeds them; sending returns
    before they are done. One program is timed against two, in turns."""
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("two cores are needed")

    def timed(n: int) -> tuple[float, float]:
        xs = [_noise(384, 384, seed=k).to("genie") for k in range(n)]
        started = time.perf_counter()
        for k in range(n):
            for _ in range(64):  # 128 instructions: a program that goes out by itself
                xs[k] = (xs[k] @ xs[k]).tanh()
        sent = time.perf_counter() - started
        for x in xs:
            x.sum().cpu()
        return sent, time.perf_counter() - started

    with pooled(trio[:2], _Turns()) as pool:
        for _ in range(3):
            timed(1), timed(2)
        planned = pool.planned
        rounds = [(timed(1)[1], *timed(2)) for _ in range(9)]
        assert pool.planned == planned
    one, sent, both = (statistics.median(column) for column in zip(*rounds, strict=True))
    assert sent < 0.5 * both
    if os.getloadavg()[0] < 1.5:  # else there are no two cores for two servers
        assert both < 1.5 * one


def test_an_executor_can_be_made_and_closed(trio) -> None:
    made = executor(trio, Home())
    made.close()
    made.close()
