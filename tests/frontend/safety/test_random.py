"""Random ops are drawn anew at each call, follow the seed, and touch no other device's generator."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from tests.frontend.safety.compare import numbers, same


def dropout(x):
    return functional.dropout(x, 0.5, training=True)


def dropout_of_features(x):
    return functional.dropout2d(x.view(1, 4, 4, 4), 0.5, training=True)


def like(x):
    return torch.rand_like(x) + torch.randn_like(x)


def made(x):
    return (
        torch.rand(4, device=x.device),
        torch.randn(2, 3, device=x.device),
        torch.randperm(6, device=x.device),
    )


def integers(x):
    return torch.randint(0, 10, (5,), device=x.device), torch.randint_like(x, 3)


def in_place(x):
    return x.clone().uniform_(-1, 1), x.clone().normal_(2.0, 0.5), x.clone().bernoulli_(0.3)


def distributions(x):
    p = x.sigmoid()
    return torch.bernoulli(p), torch.normal(p, p), x.clone().exponential_(2.0)


def multinomial(x):
    return torch.multinomial(x.view(8, 8).softmax(-1), 1), torch.multinomial(x.exp(), 5)


RANDOM = [dropout, dropout_of_features, like, made, integers, in_place, distributions, multinomial]


@pytest.mark.parametrize("f", RANDOM)
def test_a_seed_gives_the_stream_of_the_cpu(capture, f) -> None:
    @torch.no_grad()
    def program(c):
        run, x, outs = c(f), numbers(c.device, 64), []
        torch.manual_seed(11)
        outs += [run(x), run(x), run(x)]
        torch.manual_seed(11)
        return [*outs, run(x)]

    same(capture, program)


@pytest.mark.parametrize("f", RANDOM)
@torch.no_grad()
def test_two_calls_differ_and_one_seed_repeats(capture, f) -> None:
    def drawn():
        out = run(x)
        return torch.cat([t.double().flatten() for t in ([out] if torch.is_tensor(out) else out)]).cpu()

    run, x = capture(f), numbers("genie", 64)
    torch.manual_seed(5)
    first, second = drawn(), drawn()
    torch.manual_seed(5)
    assert torch.equal(drawn(), first)
    assert torch.equal(drawn(), second)
    assert not torch.equal(first, second)


@torch.no_grad()
def test_the_host_generator_and_the_device_generator_do_not_touch(capture) -> None:
    run, x = capture(dropout), numbers("genie", 64)
    torch.manual_seed(3)
    alone = [run(x).cpu() for _ in range(3)]
    torch.manual_seed(3)
    host_alone = [torch.rand(2) for _ in range(3)]
    torch.manual_seed(3)
    for device_draw, host_draw in zip(alone, host_alone, strict=True):
        assert torch.equal(torch.rand(2), host_draw)
        assert torch.equal(run(x).cpu(), device_draw)


def test_dropout_in_training_gives_the_gradient_of_its_own_mask(capture) -> None:
    def program(c):
        torch.manual_seed(2)
        model = nn.Sequential(nn.Linear(8, 32), nn.Dropout(0.5), nn.ReLU(), nn.Linear(32, 2)).to(c.device)
        run, x = c(model), numbers(c.device, 3, 8)
        torch.manual_seed(4)
        outs = []
        for _ in range(3):
            out = run(x)
            out.sum().backward()
            outs.append(out)
        return [*outs, *(p.grad for p in model.parameters())]

    same(capture, program)


def test_train_and_eval_switched_after_the_first_calls(capture) -> None:
    @torch.no_grad()
    def program(c):
        torch.manual_seed(2)
        model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Dropout(0.5)).to(c.device)
        run, x, outs = c(model), numbers(c.device, 4, 8), []
        torch.manual_seed(6)
        for training in (True, False, True, True, False):
            model.train(training)
            outs += [run(x), model[1].running_mean.clone()]
        model.eval()
        model[2].train()
        outs.append(run(x))
        model[2].p = 0.9
        return [*outs, run(x), model[1].num_batches_tracked]

    same(capture, program)


@torch.no_grad()
def test_a_seed_set_inside_the_program_counts(capture) -> None:
    def f(x):
        torch.manual_seed(21)
        return torch.rand_like(x)

    def program(c):
        run = c(f)
        return [run(numbers(c.device, 4)) for _ in range(3)]

    same(capture, program)


@torch.no_grad()
def test_two_sessions_draw_from_streams_of_their_own(servers) -> None:
    import genie
    from tests.frontend.conftest import TOKEN

    with genie.connect(servers[0].address, TOKEN):
        torch.manual_seed(8)
        first = torch.rand(4, device="genie").cpu()
        with genie.connect(servers[0].address, TOKEN):
            torch.manual_seed(9)
            other = torch.rand(4, device="genie").cpu()
        second = torch.rand(4, device="genie").cpu()
    torch.manual_seed(8)
    assert torch.equal(first, torch.rand(4))
    assert torch.equal(second, torch.rand(4))
    assert not torch.equal(first, other)


def test_a_generator_is_refused_with_the_remedy(capture) -> None:
    with pytest.raises(RuntimeError, match=r"torch\.manual_seed"):
        torch.rand(3, device="genie", generator=torch.Generator())
