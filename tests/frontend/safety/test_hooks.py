"""Hooks added and removed after the first calls take effect at once."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.frontend.safety.compare import numbers, same


def forward_hook(model: nn.Module):
    return model[0].register_forward_hook(lambda m, args, out: out * 2)


def forward_hook_of_the_root(model: nn.Module):
    return model.register_forward_hook(lambda m, args, out: out + 1)


def pre_hook(model: nn.Module):
    return model[0].register_forward_pre_hook(lambda m, args: (args[0] - 1,))


def pre_hook_with_kwargs(model: nn.Module):
    def hook(m, args, kwargs):
        return (args[0] * 3,), kwargs

    return model[0].register_forward_pre_hook(hook, with_kwargs=True)


def forward_hook_with_kwargs(model: nn.Module):
    return model[0].register_forward_hook(lambda m, args, kwargs, out: out - 5, with_kwargs=True)


def global_forward_hook(model: nn.Module):
    def hook(m, args, out):
        return out * 0.5 if isinstance(m, nn.Linear) else None

    return nn.modules.module.register_module_forward_hook(hook)


def global_pre_hook(model: nn.Module):
    def hook(m, args):
        return (args[0] + 2,) if isinstance(m, nn.Linear) else None

    return nn.modules.module.register_module_forward_pre_hook(hook)


HOOKS = [
    forward_hook, forward_hook_of_the_root, pre_hook, pre_hook_with_kwargs, forward_hook_with_kwargs,
    global_forward_hook, global_pre_hook,
]  # fmt: skip


@pytest.mark.parametrize("add", HOOKS)
def test_a_hook_added_and_removed_after_the_first_calls(capture, mode: str, add) -> None:
    if mode == "compiled" and add in (global_forward_hook, global_pre_hook):
        pytest.skip("Dynamo guards no global hooks: with any backend, what was compiled without them stays")

    @torch.no_grad()
    def program(c):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(4, 4), nn.Tanh()).to(c.device)
        run, x = c(model), numbers(c.device, 2, 4)
        outs = [run(x), run(x)]
        handle = add(model)
        try:
            outs += [run(x), run(x)]
        finally:
            handle.remove()
        return [*outs, run(x), run(x)]

    same(capture, program)


def test_a_hook_with_side_effects_runs_at_every_call(capture) -> None:
    @torch.no_grad()
    def program(c):
        model = nn.Sequential(nn.Linear(4, 4), nn.Tanh()).to(c.device)
        run, x, seen = c(model), numbers(c.device, 2, 4), []
        run(x)
        handle = model[0].register_forward_hook(lambda m, args, out: seen.append(tuple(out.shape)))
        run(x), run(x), run(x)
        handle.remove()
        run(x)
        return seen

    same(capture, program)


def test_a_hook_that_keeps_activations_keeps_those_of_its_call(capture) -> None:
    @torch.no_grad()
    def program(c):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(4, 4), nn.Tanh()).to(c.device)
        kept = []
        model[0].register_forward_hook(lambda m, args, out: kept.append(out))
        run = c(model)
        for i in range(3):
            run(numbers(c.device, 2, 4, seed=i))
        return kept

    same(capture, program)


def test_a_backward_hook_and_a_tensor_hook(capture) -> None:
    def program(c):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(4, 4), nn.Tanh()).to(c.device)
        run, x = c(model), numbers(c.device, 2, 4)
        run(x).sum().backward()
        model.zero_grad()
        handle = model[0].weight.register_hook(lambda g: g * 10)
        run(x).sum().backward()
        first = model[0].weight.grad.clone()
        handle.remove()
        run(x).sum().backward()
        return first, model[0].weight.grad

    same(capture, program)


def test_forward_replaced_on_the_instance(capture) -> None:
    @torch.no_grad()
    def program(c):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(4, 4), nn.Tanh()).to(c.device)
        run, x = c(model), numbers(c.device, 2, 4)
        first = run(x)
        model[1].forward = lambda y: y * 100
        return first, run(x), run(x)

    same(capture, program)
