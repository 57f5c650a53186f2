"""Parameters of a module are hashed before their turn; the server gets what they are at their turn."""

from __future__ import annotations

import time

import pytest
import torch
from torch import nn

import genie
from genie.devices import device_slot
from genie.runtime.server_process import ServerProcess
from genie.wire import ahead, digest

needs_a_core = pytest.mark.skipif(digest.threads() < 1, reason="on one core nothing is hashed ahead")


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with ServerProcess.start(
        device_slot("cpu", 0), token="ahead", log_dir=tmp_path_factory.mktemp("logs")
    ) as started:
        yield started


@pytest.fixture
def link(server):
    with genie.connect(server.address, "ahead") as session:
        yield session.executor.link
    ahead.forget()


def parameters(n: int, seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(200, 300 + k, generator=generator) for k in range(n)]


def announce_and_wait(tensors: list[torch.Tensor]) -> None:
    ahead.announce(tensors)
    deadline = time.monotonic() + 60
    while len(ahead.ready()) < len(tensors):
        assert time.monotonic() < deadline
        time.sleep(0.001)


@needs_a_core
def test_announced_contents_are_offered_together(link):
    tensors = parameters(10, 1)
    announce_and_wait(tensors)
    before = link.connection.round_trips
    digests = [link.upload(-1 - k, t, True) for k, t in enumerate(tensors)]
    assert link.connection.round_trips == before + 1
    assert digests == [digest.digest(t.numpy().tobytes()) for t in tensors]
    announce_and_wait(tensors)
    sent = link.connection.bytes_out
    for k, t in enumerate(tensors):
        link.upload(-101 - k, t, True)
    assert link.connection.round_trips == before + 2
    assert link.connection.bytes_out - sent < 5000, "the server has them"
    link.settle()


@needs_a_core
def test_a_content_that_was_written_to_after_its_announcement_is_hashed_anew(link):
    tensors = parameters(4, 2)
    announce_and_wait(tensors)
    link.upload(-1, tensors[0], True)  # offers the other three, too
    tensors[1].view(-1)[5:9].add_(1)
    assert link.upload(-2, tensors[1], True) == digest.digest(tensors[1].numpy().tobytes())
    link.upload(-3, tensors[2], True)
    link.settle()


@needs_a_core
def test_equal_contents_and_other_orders_and_unannounced_ones(link):
    a, b, c = parameters(3, 3)
    twin, stranger = a.clone(), parameters(4, 4)[3]
    announce_and_wait([a, b, twin, c])
    before = link.connection.bytes_out
    expected = [digest.digest(t.numpy().tobytes()) for t in (b, twin, stranger, c, a)]
    assert [link.upload(-k, t, True) for k, t in enumerate((b, twin, stranger, c, a), 1)] == expected
    link.settle()
    assert link.connection.bytes_out - before < 4 * c.nbytes + 5000, "a twin is not sent twice"


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(700, 64)
        self.body = nn.Sequential(*(nn.Linear(64, 64 + 0 * k) for k in range(3)), nn.Linear(64, 300))
        self.strided = nn.Parameter(torch.randn(300, 128).t())
        self.holes = nn.Parameter(torch.randn(400, 200)[::2, ::2])
        self.register_buffer("steps", torch.arange(20_000.0))
        self.head = nn.Linear(64, 700, bias=False)
        self.head.weight = self.embedding.weight


@pytest.mark.parametrize("dtype", [None, torch.float64])
def test_a_module_arrives_as_it_was(server, dtype):
    torch.manual_seed(5)
    model = Tied().requires_grad_(False)
    before = {k: v.to(dtype or v.dtype, copy=True) for k, v in model.state_dict().items()}
    with genie.connect(server.address, "ahead"):
        model.to("genie", dtype)
        assert model.head.weight is model.embedding.weight
        after = {k: v.cpu() for k, v in model.state_dict().items()}
    assert before.keys() == after.keys()
    for k, v in before.items():
        assert torch.equal(v, after[k]), k
    assert not ahead._mine.begun and not ahead._mine.later


@needs_a_core
def test_nothing_is_kept_of_a_module_that_could_not_move(server):
    class Stubborn(nn.Module):
        def _apply(self, fn, recurse=True):
            raise RuntimeError("stays here")

    model = nn.Sequential(nn.Linear(300, 300), Stubborn(), nn.Linear(300, 300))
    with genie.connect(server.address, "ahead"):
        with pytest.raises(RuntimeError, match="stays here"):
            model.to("genie")
        assert not ahead._mine.begun and not ahead._mine.later
        model[0].cpu()


def test_looking_ahead_is_bounded(monkeypatch):
    monkeypatch.setattr(ahead, "LOOK_AHEAD", 3 * 240_000)
    monkeypatch.setattr(digest, "threads", lambda: 1)
    tensors = [torch.full((60_000,), float(k)) for k in range(9)]
    try:
        ahead.announce(tensors)
        assert len(ahead._mine.begun) == 3
        for t in tensors:
            assert ahead.take(t) == digest.digest(t.numpy().tobytes())
            assert len(ahead._mine.begun) <= 3
    finally:
        ahead.forget()
