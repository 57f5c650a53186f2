"""Tensors that a program makes, holds or closes over, on the device and on the CPU."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.frontend.safety.compare import counting, numbers, same

TABLE = torch.tensor([3.0, 1.0, 2.0])


def in_forward(x):
    return x + torch.tensor([1.0, 2.0, 3.0], device=x.device)


def moved_in_forward(x):
    return x * torch.tensor([1.0, 2.0, 3.0]).to(x.device)


def zero_dim_of_the_cpu(x):
    return x * torch.tensor(2.5) + torch.tensor(3)


def global_of_the_cpu(x):
    return x * TABLE.to(x.device)


def python_list(x):
    return x[torch.tensor([2, 0])] + torch.as_tensor([1.0, 2.0], device=x.device)


def factories(x):
    mask = torch.tril(torch.ones(3, 3, device=x.device)).bool()
    return x.masked_fill(~mask, -1.0).sum(0) + torch.arange(3, device=x.device) + torch.zeros_like(x)


def new_tensors(x):
    return x + x.new_tensor([1.0, 0.0, 1.0]) + x.new_full((3,), 2.0) + x.new_zeros(3)


def written_constant(x):
    c = torch.zeros(3, device=x.device)
    c[1] = 5
    c += x
    return c


@pytest.mark.parametrize(
    "f",
    [in_forward, moved_in_forward, zero_dim_of_the_cpu, global_of_the_cpu, python_list, factories,
     new_tensors, written_constant],
)  # fmt: skip
def test_a_constant(capture, f) -> None:
    @torch.no_grad()
    def program(c):
        run = c(f)
        return [run(numbers(c.device, 3, seed=i)) for i in range(3)]

    same(capture, program)


def test_a_result_that_is_a_constant_is_new_at_every_call(capture) -> None:
    def f(x):
        return torch.zeros(3, device=x.device), torch.tensor([1, 2], device=x.device), x + 1

    @torch.no_grad()
    def program(c):
        run, outs = c(f), []
        for _ in range(3):
            zeros, pair, _ = run(counting(c.device, 3))
            zeros.add_(1)
            pair.mul_(2)
            outs += [zeros, pair]
        return outs

    same(capture, program)


@pytest.mark.parametrize("place", ["device", "cpu"])
def test_a_closed_over_tensor_that_is_written_to(capture, place: str) -> None:
    @torch.no_grad()
    def program(c):
        held = torch.tensor([1.0, 2.0, 3.0])
        if place == "device":
            held = held.to(c.device)
        run, x, outs = c(lambda t: t * held.to(t.device)), numbers(c.device, 3), []
        outs.append(run(x))
        held.add_(10)
        outs.append(run(x))
        held[0] = -1
        return [*outs, run(x), run(x)]

    same(capture, program)


def test_a_closed_over_cpu_scalar_that_is_written_to(capture) -> None:
    @torch.no_grad()
    def program(c):
        scale = torch.tensor(2.0)
        run, x, outs = c(lambda t: t * scale), numbers(c.device, 3), []
        outs.append(run(x))
        scale.fill_(5.0)
        return [*outs, run(x), run(x)]

    same(capture, program)


def test_a_cpu_counter_held_by_the_module(capture) -> None:
    class Stepping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.step = torch.tensor(0)  # not a buffer: stays on the CPU

        def forward(self, x):
            self.step += 1
            return x + self.step, x[: int(self.step)]

    @torch.no_grad()
    def program(c):
        model = Stepping().to(c.device)
        run, x = c(model), counting(c.device, 5)
        outs = [run(x) for _ in range(4)]
        return [*outs, int(model.step)]

    same(capture, program)


def test_a_buffer_on_the_device_held_as_constant(capture) -> None:
    class Rotary(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("inv", 1.0 / (10.0 ** torch.arange(0, 4, 2)), persistent=False)

        def forward(self, x, positions):
            angles = positions[:, None].float() * self.inv
            return torch.cat([x * angles.cos(), x * angles.sin()], -1)

    @torch.no_grad()
    def program(c):
        model = Rotary().to(c.device)
        run, outs = c(model), []
        for start in (0, 3, 7):
            outs.append(run(numbers(c.device, 3, 2), torch.arange(start, start + 3, device=c.device)))
        model.inv = model.inv * 2
        return [*outs, run(numbers(c.device, 3, 2), torch.arange(3, device=c.device))]

    same(capture, program)


def test_cpu_arguments_meet_device_tensors(capture) -> None:
    def f(x, scale, index):
        return x * scale, x[index], scale * x, x.index_select(0, index.to(x.device))

    @torch.no_grad()
    def program(c):
        run = c(f)
        return [
            run(numbers(c.device, 4), torch.tensor(2.0 + i), torch.tensor([i, 3 - i, 1])) for i in range(3)
        ]

    same(capture, program)


def test_to_the_device_and_back_inside_forward(capture) -> None:
    def f(host, x):
        y = host.to(x.device) + x
        z = y.cpu().sort().values
        return y, z.to(x.device) * 2, float(z[0])

    @torch.no_grad()
    def program(c):
        run, outs = c(f), []
        for i in range(3):
            host = numbers("cpu", 4, seed=i)
            outs.append(run(host, numbers(c.device, 4, seed=i + 5)))
            host.zero_()
        return outs

    same(capture, program)


def test_a_cpu_argument_written_to_after_the_call(capture) -> None:
    @torch.no_grad()
    def program(c):
        run, host = c(lambda h, x: h.to(x.device) * x), torch.ones(3)
        outs = [run(host, numbers(c.device, 3))]
        host.add_(4)
        outs.append(run(host, numbers(c.device, 3)))
        host.zero_()
        return outs

    same(capture, program)


def test_different_dtypes_of_one_argument(capture) -> None:
    @torch.no_grad()
    def program(c):
        run, outs = c(lambda x: (x + 1, x * 0.5, x.sum())), []
        for dtype in (torch.float32, torch.int64, torch.float64, torch.bool, torch.int32, torch.float32):
            outs.append(run(torch.tensor([0, 1, 1]).to(c.device, dtype)))
        return outs

    same(capture, program)
