"""Caches in place: whatever a client does with its caches, it gets what it would get without engines."""

from __future__ import annotations

import copy
import gc
import time

import pytest
import torch

from genie.server.engines import growing
from tests.server.engines.serving import counters, prompt, session
from tests.server.engines.toys import Decoder, choose, decode, generate

IDS = prompt(vocabulary=64)


@pytest.fixture(scope="module")
def model():
    return Decoder()


def compare(serving, model, run, *, least=8, run_ahead=0):
    """``run(model, device)`` gives on the server, twice, the tensors that it gives here. Returns counters."""
    with torch.no_grad():
        expected = run(model, "cpu")
    with session(serving, replay=False, run_ahead=run_ahead) as opened:
        remote = copy.deepcopy(model).to("genie")
        for _ in range(2):
            for one, other in zip(run(remote, "genie"), expected, strict=True):
                torch.testing.assert_close(one.cpu(), other, rtol=1e-3, atol=1e-3)
        seen = counters(opened)
        refusals = serving.refusals()
    assert seen["rewritten"] >= least, refusals
    assert not seen["engine_failed"]
    if serving.device.graphs is not None:
        assert seen["engine_graph"] >= least
    return seen


@pytest.mark.parametrize("groups", [4, 2], ids=["heads", "groups"])
@pytest.mark.parametrize("batch", [1, 3])
def test_tokens_are_those_without(serving, groups, batch):
    ids = prompt(vocabulary=64, batch=batch)
    compare(serving, Decoder(groups=groups), lambda m, d: [generate(m, ids.to(d))], least=30)


def test_a_cache_that_outgrows_its_buffers(serving, model, monkeypatch):
    made = []
    capacity_for = growing.capacity_for
    monkeypatch.setattr(growing, "capacity_for", lambda n: made.append(capacity_for(n)) or made[-1])
    ids = prompt(length=240, vocabulary=64)

    def run(m, device):
        tokens, (_, caches) = decode(m, *choose(*m(ids.to(device))), 30)
        return [tokens, *caches]

    compare(serving, model, run, least=50)
    assert {256, 512} <= set(made)
    assert len(made) <= 6, "buffers are allocated once for each capacity and generation"


def test_two_continuations_of_one_past(serving, model):
    def run(m, device):
        tokens, (token, caches) = decode(m, *choose(*m(IDS.to(device))), 12)
        others = [decode(m, torch.tensor([[k]]).to(device), caches, 6) for k in (3, 40)]
        again = decode(m, token, caches, 6)
        return [tokens, *caches, again[0], *again[1][1], *(v for t, (_, c) in others for v in (t, *c))]

    compare(serving, model, run)


def test_two_generations_in_turns(serving, model):
    def run(m, device):
        states = [choose(*m(prompt(seed, vocabulary=64).to(device))) for seed in (0, 1)]
        tokens = []
        for k in range(32):
            new, states[k % 2] = decode(m, *states[k % 2], 1)
            tokens.append(new)
        return tokens

    compare(serving, model, run)


def test_an_earlier_length_is_continued_anew(serving, model):
    """As assisted decoding does: some tokens forward, and back to a cache of before."""

    def run(m, device):
        _, kept = decode(m, *choose(*m(IDS.to(device))), 10)
        tokens = []
        for _ in range(4):
            more, _ = decode(m, *kept, 5)
            tokens.append(more)
            one, kept = decode(m, *kept, 1)
            tokens.append(one)
        return tokens

    compare(serving, model, run)


def test_a_cache_cut_short_is_continued(serving, model):
    def cut(step, token, caches):
        return (token, [c[:, :, :-3] for c in caches]) if step % 9 == 8 else None

    compare(serving, model, lambda m, d: [generate(m, IDS.to(d), 40, cut)])


def test_a_cache_that_is_read(serving, model):
    def run(m, device):
        read = []

        def act(step, token, caches):
            if step in (10, 11, 18):
                read.extend(c.cpu() for c in caches[1:3])

        return [generate(m, IDS.to(device), 28, act), *read]

    compare(serving, model, run)


def test_a_cache_that_is_computed_with(serving, model):
    def run(m, device):
        sums = []

        def act(step, token, caches):
            if step % 5 == 4:
                sums.append((caches[0] * 2).sum() + caches[3].max())

        return [generate(m, IDS.to(device), 28, act), *sums]

    compare(serving, model, run)


def test_a_cache_that_is_written_to(serving, model):
    def act(step, token, caches):
        if step in (10, 11, 18):
            caches[2].mul_(0.5)
            caches[1][:, :, 0].zero_()

    compare(serving, model, lambda m, d: [generate(m, IDS.to(d), 28, act)])


def test_a_view_of_a_cache_is_a_view_of_it(serving, model):
    """Made by a program that writes nothing, written to by the next one."""

    def run(m, device):
        seen = []

        def act(step, token, caches):
            if step == 12:
                head = caches[1][:, 0]
                seen.append((head + 1).cpu())
                head.mul_(3)
                seen.extend((caches[1].cpu(), head.cpu()))

        return [generate(m, IDS.to(device), 20, act), *seen]

    compare(serving, model, run)


def test_a_cache_that_is_reordered(serving, model):
    """As beam search does after every step: the rows of all caches are chosen anew."""
    ids = prompt(vocabulary=64, batch=3)

    def run(m, device):
        order = torch.tensor([2, 0, 0]).to(device)

        def act(step, token, caches):
            if step >= 8 and step % 2:
                return token.index_select(0, order), [c.index_select(0, order) for c in caches]
            return None

        return [generate(m, ids.to(device), 24, act)]

    compare(serving, model, run, least=5)


def test_a_generation_that_is_interrupted(serving, model):
    def run(m, device):
        tokens = []
        for seed, steps in ((0, 11), (1, 7), (2, 9), (0, 12)):
            tokens.append(generate(m, prompt(seed, 5 + seed, vocabulary=64).to(device), steps))
        return tokens

    compare(serving, model, run)


def test_masks_are_made_beside_the_graph(serving):
    """A mask made in the program, from one that grows: padding on the left of one of two rows."""

    class Masked(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.decoder = Decoder(groups=4)

        def forward(self, ids, pasts, valid):
            batch, n = ids.shape
            positions = torch.arange(valid.shape[1], device=ids.device)
            queries = positions[-n:].view(1, 1, n, 1)
            mask = (positions.view(1, 1, 1, -1) <= queries) & valid.bool().view(batch, 1, 1, -1)
            additive = torch.zeros(mask.shape, device=ids.device).masked_fill(~mask, -1e9)
            return self.decoder(ids, pasts, additive)

    model = Masked().eval()
    ids = prompt(batch=2, vocabulary=64)
    valid = torch.ones_like(ids)
    valid[1, :4] = 0

    def run(m, device):
        mask = valid.to(device)
        token, caches = choose(*m(ids.to(device), None, mask))
        tokens = []
        for _ in range(24):
            mask = torch.cat([mask, torch.ones((2, 1), dtype=torch.int64).to(device)], dim=1)
            assert (
                (token > 99).sum() + mask.sum()
            ).item() == mask.numel() - 4  # a program of its own grows it
            logits, caches = m(token, caches, mask)
            token, _ = choose(logits, caches)
            tokens.append(logits.cpu())
        return tokens

    compare(serving, model, run, least=20)


@pytest.mark.parametrize("in_place", [False, True])
def test_a_mask_that_is_made_in_place(serving, in_place):
    """The first generation has no padding, the next has: what is written into a mask counts."""

    class Masked(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.decoder = Decoder(groups=4)

        def forward(self, ids, pasts, valid):
            batch, n = ids.shape
            positions = torch.arange(valid.shape[1], device=ids.device)
            mask = torch.zeros((batch, 1, n, valid.shape[1]), device=ids.device)
            seen = (positions.view(1, 1, 1, -1) <= positions[-n:].view(1, 1, n, 1)) & valid.bool().view(
                batch, 1, 1, -1
            )
            mask = mask.masked_fill_(~seen, -1e9) if in_place else mask.masked_fill(~seen, -1e9)
            return self.decoder(ids, pasts, mask)

    model = Masked().eval()
    ids = prompt(batch=2, vocabulary=64)

    def run(m, device):
        found = []
        for padded in (0, 4):
            valid = torch.ones_like(ids)
            valid[1, :padded] = 0
            mask = valid.to(device)
            token, caches = choose(*m(ids.to(device), None, mask))
            for _ in range(12):
                mask = torch.cat([mask, torch.ones((2, 1), dtype=torch.int64).to(device)], dim=1)
                # The mask comes from a program of its own, as it does in `generate`.
                assert ((token > 99).sum() + mask.sum()).item() == mask.numel() - padded
                logits, caches = m(token, caches, mask)
                token, _ = choose(logits, caches)
                found.append(logits.cpu())
        return found

    compare(serving, model, run, least=0 if in_place else 8)


def test_what_another_generation_left_is_gone(serving, model):
    """Masked positions count for nothing, but NaN times nothing is NaN."""

    def run(m, device):
        decode(m, *choose(*m(IDS.to(device), None)), 20)
        return [generate(m, IDS[:, :3].to(device), 12)]

    with torch.no_grad():
        expected = run(model, "cpu")
    with session(serving, replay=False):
        remote = copy.deepcopy(model).to("genie")
        run(remote, "genie")
        if serving.device.graphs is not None:
            for alike in serving.pool._instances.values():
                for instance in alike:
                    for buffer in instance.buffers.tensors if instance.buffers is not None else ():
                        buffer.fill_(float("nan"))
        torch.testing.assert_close(run(remote, "genie"), expected, rtol=1e-3, atol=1e-3)


def test_a_bias_for_each_head_is_a_mask(serving):
    class Biased(torch.nn.Module):
        def __init__(self, groups):
            super().__init__()
            self.decoder = Decoder(groups=groups)
            self.slopes = torch.nn.Parameter(torch.tensor([0.1, 0.2, 0.4, 0.8]).view(1, 4, 1, 1))

        def forward(self, ids, pasts, length):
            distance = torch.arange(length - 1, -1, -1, device=ids.device).view(1, 1, 1, -1)
            return self.decoder(ids, pasts, -self.slopes * distance)

    for groups in (4, 2):

        def run(m, device):
            token = torch.tensor([[5]]).to(device)
            pasts = [torch.zeros(1, groups, 3, 8).to(device) for _ in range(4)]  # noqa: B023
            tokens = []
            for k in range(24):
                logits, pasts = m(token, pasts, 4 + k)
                token, _ = choose(logits, pasts)
                tokens.append(logits.cpu())
            return tokens

        compare(serving, Biased(groups).eval(), run, least=20)


def test_weights_that_are_written_to_are_seen(serving, model):
    def run(m, device):
        m = copy.deepcopy(m)
        tokens = [generate(m, IDS.to(device), 16)]
        for _ in range(2):
            m.embed.weight.mul_(-1.1)
            m.k[1].weight.add_(0.25)
            tokens.append(generate(m, IDS.to(device), 16))
        return tokens

    compare(serving, model, run, least=15)


def test_a_second_model_of_the_same_architecture(serving, model):
    other = Decoder(seed=1)
    with torch.no_grad():
        expected = [generate(m, IDS) for m in (model, other)]
    assert not torch.allclose(*expected, atol=1)
    with session(serving, replay=False) as opened:
        remote = [copy.deepcopy(m).to("genie") for m in (model, other)]
        for _ in range(3):
            for m, tokens in zip(remote, expected, strict=True):
                torch.testing.assert_close(generate(m, IDS.to("genie")), tokens, rtol=1e-3, atol=1e-3)
        counters(opened)
        generate(remote[0], IDS.to("genie"))
        generate(remote[1], IDS.to("genie"))
        assert counters(opened)["rewritten"] >= 2 * 20, "each has a variant of its own"


@pytest.mark.parametrize("sizes", [range(2, 40), [2, 3, 4, 5, 6] * 8], ids=["new", "in turns"])
def test_sizes_that_differ_from_run_to_run(serving, sizes):
    with session(serving, replay=False) as opened:
        weight = torch.arange(40.0).view(1, 40).to("genie")
        for n in sizes:
            x = torch.ones(n, 1).to("genie")
            y = ((x * weight).relu() + 1).sum(dim=0)
            assert y[3].item() == 3.0 * n + n
        refusals = serving.refusals()
        seen = counters(opened)
    assert not seen["engine_failed"]
    if len(set(sizes)) == len(sizes):
        assert not seen["rewritten"] and not seen["engine_graph"]
    else:
        assert refusals, "it is not looked at for ever"


def test_programs_that_write_or_draw_stay_eager(serving):
    with session(serving, replay=False) as opened:
        x = torch.ones(64, 64).to("genie")
        for _ in range(6):
            x.mul_(2).add_(1)
            assert x[0, 0].item() > 1
        y = torch.ones(64, 64).to("genie")
        drawn = [((y * torch.rand_like(y)) + 1).sum().item() for _ in range(6)]
        refusals = serving.refusals()
        seen = counters(opened)
    assert len(set(drawn)) == 6
    assert any("draws random numbers" in why for why in refusals)
    assert any("writes to its externals" in why for why in refusals)
    assert not seen["engine_failed"]


def test_running_ahead_changes_nothing(serving, model):
    def run(m, device):
        read = []

        def act(step, token, caches):
            if step == 16:
                read.append(caches[0].cpu())
            if step == 22:
                return torch.tensor([[7]]).to(device), caches
            return None

        tokens = [generate(m, IDS.to(device), 30, act), generate(m, IDS.to(device), 12)]
        return tokens + read

    assert compare(serving, model, run, run_ahead=1)["ahead"]


def test_a_program_without_reply_keeps_nothing_alive(serving):
    """Its receipt is told with the next reply; what it made is released long before."""
    shape = (313, 7)

    def held() -> int:
        """Tensors of that shape in the server, which is in this process."""
        return sum(type(t) is torch.Tensor and t.shape == shape for t in gc.get_objects())

    with session(serving, replay=False) as opened:
        x = torch.ones(shape).to("genie")
        (x + 1).sum().item()
        before = held()
        for _ in range(20):
            x = x + 1
            opened.recorder.flush()
        deadline = time.monotonic() + 20.0
        while held() > before + 3 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert held() <= before + 3
        assert x[0, 0].item() == 21.0
