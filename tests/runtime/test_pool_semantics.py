"""What a program means does not depend on where its parts run: writes, views, random numbers, errors."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from genie.errors import RemoteOpError
from genie.frontend.session import Session
from genie.runtime import pool as pool_module
from genie.runtime.remote import ResidentExecutor, open_link
from genie.scheduler.problem import Problem
from tests.runtime.pools import TOKEN, Alternate, Home, Rows, Scatter, handles, placed, pooled

POLICIES = {
    "scatter": lambda: Scatter(2),
    "single ops": lambda: Alternate(1),
    "blocks": lambda: Alternate(4, 1),
    "rows": lambda: Rows(1, 3),
}


class On:
    """Ops by name on a server, all others at home."""

    name = "on"

    def __init__(self, **servers: int) -> None:
        self.servers = servers

    def propose(self, problem: Problem) -> list:
        home = problem.cluster.home
        wish = [(self.servers.get(n.name, home),) for n in problem.graph.nodes]
        return [placed(problem, self.name, wish)]


def _noise(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def writes(device: str) -> list[Tensor]:
    x, w = _noise(4, 8).to(device), _noise(8, 8, seed=2).to(device)
    y = x @ w
    view = y[1:]
    first = y.sum(1).cpu()
    y.add_(1)
    z = (y * 2).relu()
    y.mul_(3)
    second = (view @ w).cpu()  # after a write through what it is a view of
    view.sub_(5)
    third = (y @ w + z).cpu()
    w.t_()
    w[0].fill_(1)
    return [first, second, third, (x @ w).cpu(), y.cpu(), view.cpu(), z.cpu()]


def read_in_the_middle(device: str) -> list[Tensor]:
    x = _noise(4, 16).to(device)
    scale = (x * x).sum().item()
    y = x / scale
    found = (y > 0).nonzero()
    return [y.cpu(), found.cpu(), y[y > 0].sum().reshape(1).cpu(), (found.sum() + y.sum()).reshape(1).cpu()]


def host_is_not_shared(device: str) -> list[Tensor]:
    big, small = _noise(4, 8192), _noise(4, 8, seed=3)
    a, b = big.to(device, copy=True), small.to(device, copy=True)
    big.zero_()
    small.zero_()
    return [(a * 2).sum(1).cpu(), (b * 2).cpu()]


def training(device: str) -> list[Tensor]:
    torch.manual_seed(3)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 8),
        nn.GELU(), nn.Linear(8, 5),
    ).to(device)  # fmt: skip
    step = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for i in range(3):
        x, y = _noise(4, 3, 6, 6, seed=i).to(device), torch.tensor([0, 1, 2, 3]).to(device)
        step.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        step.step()
        losses.append(loss.detach().reshape(1).cpu())
    with torch.no_grad():
        model.eval()
        last = model(_noise(4, 3, 6, 6).to(device)).cpu()
    return [*losses, last, *(t.detach().cpu() for t in model.state_dict().values())]


@torch.no_grad()
def new_weights(device: str) -> list[Tensor]:
    torch.manual_seed(4)
    # Large enough to be shared by content between the servers.
    model, other = nn.Linear(256, 256), nn.Linear(256, 256)
    model.to(device)
    x = _noise(4, 256).to(device)
    got = []
    for _ in range(3):
        got.append((model(x).relu() @ model.weight).cpu())
    model.load_state_dict(other.state_dict())
    for _ in range(2):
        got.append((model(x).relu() @ model.weight).cpu())
    model.weight.data.mul_(2)
    got.append((model(x).relu() @ model.weight).cpu())
    return got


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("run", [writes, read_in_the_middle, host_is_not_shared, training, new_weights])
def test_the_same_as_on_the_cpu(trio, run: Callable[[str], list[Tensor]], policy: str) -> None:
    expected = run("cpu")
    with pooled(trio, POLICIES[policy]()) as pool:
        for _ in range(3):
            for a, b in zip(run("genie"), expected, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
        assert handles(pool) == [0, 0, 0]


def random_numbers() -> list[Tensor]:
    torch.manual_seed(11)
    x = _noise(4, 32).to("genie")
    dropped = nn.functional.dropout(x, 0.5) @ x.t()
    drawn = torch.multinomial(dropped.softmax(-1), 2, replacement=True)
    more = torch.rand(4, 8, device="genie") + drawn.sum()
    return [dropped.cpu(), drawn.cpu(), more.cpu(), torch.randn(3, 5000, device="genie").sum(1).cpu()]


@pytest.mark.parametrize("policy", POLICIES)
def test_random_numbers_are_those_of_one_server(trio, policy: str) -> None:
    with Session(ResidentExecutor(open_link(trio[0].address, TOKEN))):
        expected = random_numbers()
    with pooled(trio, POLICIES[policy]()):
        for _ in range(3):
            for a, b in zip(random_numbers(), expected, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_nothing_leaks(trio) -> None:
    for policy in (Scatter(5), Rows(1, 2, 1), Rows(2, 2, alone=0.3)):
        with pooled(trio, policy) as pool:
            model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16)).to("genie")

            def windows(n: int, model=model) -> None:
                for i in range(n):
                    y = model(_noise(4, 16, seed=i).to("genie"))
                    z = y[:, 1:]
                    (y * 2).cpu()
                    (z + 1).cpu()

            windows(10)
            held = [pool.links[s].counters().held_bytes for s in pool.alive]
            before, planned = handles(pool), pool.planned
            at = pool._at
            sizes = [
                len(at.where),
                len(at.aliases.group),
                len(at.aliases._members),
                len(at.origin),
                len(at.host),
                at.host_bytes,
            ]
            windows(200)
            assert handles(pool) == before
            assert pool.planned == planned
            after = [pool.links[s].counters().held_bytes for s in pool.alive]
            assert sum(after) <= sum(held)
            assert sizes == [
                len(at.where), len(at.aliases.group), len(at.aliases._members), len(at.origin), len(at.host),
                at.host_bytes,
            ]  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("known", [False, True])
def test_an_error_in_the_middle_is_told_with_its_line(trio, known: bool) -> None:
    """The op fails on server 1, server 0 waits for its result, and server 2 has nothing to do with it."""
    with pooled(trio, On(embedding=1, relu=2)):
        table = _noise(16, 8).to("genie")
        other = (table @ table.t()).relu()
        kept = other.sum(1).cpu()

        def request(ids: Tensor) -> Tensor:
            x = nn.functional.embedding(ids.to("genie"), table)  # here it fails
            return (x * 2 + 1) @ table.t()

        good = torch.arange(8).view(2, 4)
        expected = request(good).cpu()
        for _ in range(3 if known else 1):
            torch.testing.assert_close(request(good).cpu(), expected)
        bad = request(good + 100)
        with pytest.raises(RemoteOpError, match="embedding") as told:
            bad.cpu()
        assert "here it fails" in str(told.value)
        with pytest.raises(RemoteOpError, match="embedding"):
            (bad + 1).cpu()
        torch.testing.assert_close(other.sum(1).cpu(), kept)
        torch.testing.assert_close(request(good).cpu(), expected)
        torch.testing.assert_close((other * 3).cpu(), other.cpu() * 3)


@torch.no_grad()
def test_pending_programs_are_bounded(trio, monkeypatch) -> None:
    """By their instructions and by the bytes that the client holds for them: more are run, unread as they
    are; the result is the same."""
    monkeypatch.setattr(pool_module, "MAX_WINDOW", 200)
    monkeypatch.setattr(pool_module, "MAX_HELD_BYTES", 1 << 20)
    x = _noise(64, 64)
    expected = x
    for _ in range(600):
        expected = (expected * 1.01).relu()
    with pooled(trio, Alternate(50)) as pool:
        y = x.to("genie")
        for i in range(600):
            y = (y * 1.01).relu()
            assert pool._pending_ops <= 200 + pool.chunk, i
        torch.testing.assert_close(y.cpu(), expected, rtol=1e-4, atol=1e-5)
        assert max(len(e.problem.graph.nodes) for e in pool.explained) <= 200 + pool.chunk
        big = [torch.full((1 << 16,), float(i)).to("genie") for i in range(16)]  # 4 MB
        assert pool._at.host_bytes <= 1 << 20
        total = sum((b.sum() for b in big[1:]), big[0].sum())
        assert total.item() == sum(range(16)) * (1 << 16)


@torch.no_grad()
def test_a_known_request_is_followed_and_not_planned(trio) -> None:
    with pooled(trio[:2], Home()) as pool:
        model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8)).to("genie")
        for i in range(6):
            model(_noise(4, 64, seed=i).to("genie")).cpu()
            if i == 1:
                planned = pool.planned
        assert pool.planned == planned


def test_copies_of_a_model_share_nothing(trio) -> None:
    with pooled(trio, Alternate(1)), torch.no_grad():
        model = nn.Linear(8, 8)
        a = copy.deepcopy(model).to("genie")
        b = copy.deepcopy(a)
        x = _noise(4, 8)
        expected = model(x)
        for _ in range(2):
            torch.testing.assert_close(a(x.to("genie")).cpu(), expected)
        a.weight.zero_()
        torch.testing.assert_close(b(x.to("genie")).cpu(), expected)
        torch.testing.assert_close(a(x.to("genie")).cpu(), model.bias.expand(4, 8))
