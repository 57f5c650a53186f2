"""Branches on values, and values read in the middle of a program."""

from __future__ import annotations

import torch
from torch import nn

from tests.frontend.safety.compare import counting, numbers, same


def test_an_item_branch_follows_the_value_of_each_call(capture) -> None:
    def f(x):
        return x * 2 if x.sum().item() > 0 else x - 100

    @torch.no_grad()
    def program(c):
        run = c(f)
        return [run(torch.full((3,), v).to(c.device)) for v in (1.0, -1.0, 2.0, -3.0, 0.0)]

    same(capture, program)


def test_a_branch_on_a_tensor(capture) -> None:
    class Gate(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x):
            y = self.a(x)
            if (y > 0).all():
                return y.exp()
            if y.mean() > 0:
                return self.b(y)
            return -y

    @torch.no_grad()
    def program(c):
        torch.manual_seed(3)
        model = Gate().to(c.device)
        run = c(model)
        return [run(numbers(c.device, 1, 3, seed=i)) for i in range(6)]

    same(capture, program)


def test_a_loop_whose_length_is_a_value(capture) -> None:
    def f(x, n):
        steps = 0
        while x.abs().max() > 1:
            x = x / 2
            steps += 1
        for _ in range(int(n)):
            x = x + 1
        return x, steps

    @torch.no_grad()
    def program(c):
        run = c(f)
        return [run(counting(c.device, 5) * k, torch.tensor(k).to(c.device)) for k in (1, 3, 0, 2)]

    same(capture, program)


def test_a_value_used_as_a_number_in_later_ops(capture) -> None:
    def f(x):
        n = int(x.argmax())
        return x[:n], x * float(x.mean()), x.tolist(), torch.full((n + 1,), x.max().item()).tolist()

    @torch.no_grad()
    def program(c):
        run = c(f)
        return [
            run(torch.tensor(v).to(c.device)) for v in ([1.0, 5.0, 2.0], [9.0, 0.0, 0.0], [0.0, 1.0, 8.0])
        ]

    same(capture, program)


def test_shapes_that_depend_on_values(capture) -> None:
    def f(x):
        kept = x[x > 0]
        return kept * 2, kept.shape[0], torch.nonzero(x < 0), torch.unique(x.round())

    @torch.no_grad()
    def program(c):
        run = c(f)
        return [run(numbers(c.device, 8, seed=i)) for i in range(4)]

    same(capture, program)


def test_a_value_read_between_two_writes(capture) -> None:
    def f(x):
        x.add_(1)
        first = x[0].item()
        x.mul_(first)
        second = x[1].item()
        x.sub_(second)
        return x, first, second

    @torch.no_grad()
    def program(c):
        run = c(f)
        return [run(counting(c.device, 3) + i) for i in range(3)]

    same(capture, program)


def test_early_returns_exceptions_and_try_blocks(capture) -> None:
    def f(x):
        try:
            if x.shape[0] > 2:
                raise ValueError("long")
            return x * 3
        except ValueError:
            return x.sum()

    @torch.no_grad()
    def program(c):
        run = c(f)
        return [run(numbers(c.device, *shape)) for shape in ((3, 5), (2, 5), (2, 4), (3, 4))]

    same(capture, program)


def test_an_error_inside_leaves_earlier_writes_and_later_calls_right(capture) -> None:
    def f(x, fail: bool):
        x.add_(1)
        if fail:
            raise KeyError("asked for")
        return x * 2

    @torch.no_grad()
    def program(c):
        run, x, outs = c(f), counting(c.device, 3), []
        outs.append(run(x, False))
        try:
            run(x, True)
        except KeyError as exc:
            outs.append(exc.args)
        return [*outs, run(x, False), x]

    same(capture, program)
