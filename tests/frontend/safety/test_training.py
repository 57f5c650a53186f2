"""Backward, optimizers, accumulated gradients, and switches of the grad modes after the first calls."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from tests.frontend.safety.compare import counting, numbers, same


def classifier(device: str) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 3)).to(device)


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
    "adamw-plain": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=False),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, centered=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_steps_of_an_optimizer(capture, optimizer: str) -> None:
    def program(c):
        model = classifier(c.device)
        run, step = c(model), OPTIMIZERS[optimizer](model.parameters())
        losses = []
        for i in range(4):
            x, y = numbers(c.device, 5, 6, seed=i), (torch.arange(5) % 3).to(c.device)
            step.zero_grad(set_to_none=i % 2 == 0)
            loss = nn.functional.cross_entropy(run(x), y)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            step.step()
            losses.append(loss.item())
        return torch.tensor(losses, device=c.device), list(model.parameters())

    same(capture, program)


def test_gradients_accumulate_over_calls(capture) -> None:
    def program(c):
        model = classifier(c.device)
        run = c(model)
        for i in range(3):
            run(numbers(c.device, 2, 6, seed=i)).square().mean().backward()
        return [p.grad for p in model.parameters()]

    same(capture, program)


def test_a_gradient_for_the_input_and_none_for_frozen_weights(capture) -> None:
    def program(c):
        model = classifier(c.device)
        run, outs = c(model), []
        for frozen in (False, True, False):
            model[0].requires_grad_(not frozen)
            model.zero_grad()
            x = numbers(c.device, 2, 6).requires_grad_()
            run(x).sum().backward()
            outs += [x.grad, model[0].weight.grad is None, model[3].weight.grad]
        return outs

    same(capture, program)


def test_grad_needed_by_some_calls_only(capture) -> None:
    def program(c):
        model, outs = classifier(c.device), []
        run, x = c(model), numbers(c.device, 2, 6)
        for mode in (
            torch.no_grad,
            torch.enable_grad,
            torch.no_grad,
            torch.inference_mode,
            torch.enable_grad,
        ):
            with mode():
                out = run(x)
            outs += [out.requires_grad, out.detach() * 1]
            if out.requires_grad:
                out.sum().backward()
        return [*outs, *(p.grad for p in model.parameters())]

    same(capture, program)


def test_tensors_made_under_inference_mode(capture) -> None:
    def program(c):
        model = classifier(c.device)
        run = c(model)
        with torch.inference_mode():
            x = numbers(c.device, 2, 6) + 0
            out = run(x)
        with torch.no_grad():
            again = run(x)
        return x.is_inference(), out.is_inference(), again.is_inference(), again, out.clone()

    same(capture, program)


def test_an_inference_tensor_cannot_be_saved_for_backward(capture) -> None:
    model = classifier("genie")
    run = capture(model)
    with torch.inference_mode():
        x = numbers("genie", 2, 6) + 0
    with pytest.raises(RuntimeError, match=r"[Ii]nference tensors cannot be saved for backward"):
        run(x)


def test_grad_modes_inside_the_program(capture) -> None:
    def f(x, w):
        with torch.no_grad():
            scale = (x * w).sum()
        with torch.enable_grad():
            y = x * w
        return y, y * scale, scale.requires_grad, torch.is_grad_enabled()

    def program(c):
        run, outs = c(f), []
        for outer in (torch.enable_grad, torch.no_grad, torch.enable_grad):
            x, w = numbers(c.device, 3), numbers(c.device, 3, seed=1).requires_grad_()
            with outer():
                inner, outer_mode, *flags = run(x, w)
            inner.sum().backward()
            outs += [flags, w.grad, outer_mode]
        return outs

    same(capture, program)


def test_a_graph_kept_and_a_second_derivative(capture) -> None:
    def program(c):
        run, x = c(lambda t: (t**3).sum()), numbers(c.device, 4).requires_grad_()
        (first,) = torch.autograd.grad(run(x), x, create_graph=True)
        (second,) = torch.autograd.grad(first.sum(), x)
        return first, second

    same(capture, program)


def test_backward_twice_through_a_retained_graph(capture) -> None:
    def program(c):
        model = classifier(c.device)
        loss = c(model)(numbers(c.device, 2, 6)).sum()
        loss.backward(retain_graph=True)
        loss.backward()
        return [p.grad for p in model.parameters()]

    same(capture, program)


def test_two_forwards_before_one_backward(capture) -> None:
    def program(c):
        model = classifier(c.device)
        run = c(model)
        a, b = run(numbers(c.device, 2, 6)), run(numbers(c.device, 4, 6, seed=1))
        (b.sum() * 2 + a.mean()).backward()
        return [p.grad for p in model.parameters()]

    same(capture, program)


def test_a_weight_written_between_forward_and_backward_is_an_error(capture) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3)).to("genie")
    out = capture(model)(numbers("genie", 2, 3))
    with torch.no_grad():
        model[2].weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_a_custom_autograd_function(capture) -> None:
    class Clipped(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x * 2

        @staticmethod
        def backward(ctx, grad):
            (x,) = ctx.saved_tensors
            return grad.clamp(-0.5, 0.5) * x

    def program(c):
        run, x = c(lambda t: Clipped.apply(t).sum() * 3), numbers(c.device, 4).requires_grad_()
        run(x).backward()
        run(x).backward()
        return x.grad

    same(capture, program)


def test_activation_checkpointing_redraws_the_same_dropout(capture) -> None:
    def program(c):
        torch.manual_seed(3)
        layer = nn.Sequential(nn.Linear(6, 6), nn.Tanh()).to(c.device)
        run = c(lambda t: checkpoint(layer, t, use_reentrant=False))
        x = numbers(c.device, 2, 6).requires_grad_()
        run(x).sum().backward()
        return x.grad, [p.grad for p in layer.parameters()]

    same(capture, program)


def test_in_place_ops_under_autograd(capture) -> None:
    def f(x):
        y = x * 2
        y.mul_(3)
        y[0].add_(x[1])
        y[1:] = torch.relu(y[1:])
        return y

    def program(c):
        run, x = c(f), (counting(c.device, 3, 2) - 2).requires_grad_()
        for _ in range(2):
            run(x).sum().backward()
        return x.grad

    same(capture, program)


def test_anomaly_mode_and_saved_tensor_hooks(capture) -> None:
    def program(c):
        model, packed = classifier(c.device), []
        run = c(model)

        def pack(t):
            packed.append(1)
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), contextlib.ExitStack() as stack:
            stack.enter_context(torch.autograd.set_detect_anomaly(True))
            run(numbers(c.device, 2, 6)).sum().backward()
        return bool(packed), [p.grad for p in model.parameters()]

    same(capture, program)
