"""Python values that programs read and change: numbers, flags, strings, lists, closures, globals."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.frontend.safety.compare import numbers, same

SCALE = 2.0


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self.scale = 1.0
        self.name = "plus"
        self.history: list[int] = []
        self.options = {"shift": 1}

    def forward(self, x):
        self.calls += 1
        self.history.append(x.shape[0])
        y = x * self.scale + self.calls + self.options["shift"]
        return y if self.name == "plus" else -y


def test_counters_and_attributes_changed_by_forward(capture) -> None:
    @torch.no_grad()
    def program(c):
        model = Counting()
        run, x = c(model), numbers(c.device, 2, 3)
        outs = [run(x) for _ in range(5)]
        return outs, model.calls, model.history

    same(capture, program)


def test_attributes_changed_from_outside(capture) -> None:
    @torch.no_grad()
    def program(c):
        model = Counting()
        run, x = c(model), numbers(c.device, 2, 3)
        outs = [run(x), run(x)]
        model.scale = 3.5
        outs.append(run(x))
        model.name = "minus"
        outs.append(run(x))
        model.options["shift"] = 10
        outs.append(run(x))
        model.calls = 100
        return [*outs, run(x)]

    same(capture, program)


VALUES = {
    "int": [1, 2, 3, 0, -1, 2],
    "float": [0.5, 1.5, 2.5, 0.0, -0.0, 1e30, float("inf"), 0.5],
    "bool": [True, False, True],
    "bool_and_int": [True, 1, False, 0, 1.0],
    "str": ["add", "mul", "add"],
    "none": [None, 2.0, None, 3],
    "tuple": [(1, 2), (2, 1), (1, 2)],
    "dtype": [torch.float32, torch.float64, torch.int64],
}


@pytest.mark.parametrize("kind", VALUES)
def test_a_python_argument_that_changes_from_call_to_call(capture, kind: str) -> None:
    def f(x, value):
        if value is None:
            return x - 7
        if isinstance(value, str):
            return x + 2 if value == "add" else x * 2
        if isinstance(value, tuple):
            return x.repeat(*value)
        if isinstance(value, torch.dtype):
            return x.to(value)
        return x * value + (1 if value else 0)

    @torch.no_grad()
    def program(c):
        run, x = c(f), numbers(c.device, 2, 3)
        return [run(x, v) for v in VALUES[kind]]

    same(capture, program)


def test_integers_and_floats_of_one_value_give_their_own_types(capture) -> None:
    def f(x, value):
        return x * value

    @torch.no_grad()
    def program(c):
        run, x = c(f), torch.arange(4).to(c.device)
        return [run(x, v) for v in (2, 2.0, True, 2, 2.0)]

    same(capture, program)


def test_a_keyword_argument_given_left_out_and_given_again(capture) -> None:
    def f(x, *, scale=2.0, mask=None):
        y = x * scale
        return y if mask is None else y.masked_fill(mask, -1.0)

    @torch.no_grad()
    def program(c):
        run, x = c(f), numbers(c.device, 2, 3)
        mask = x > 0
        return [run(x), run(x, mask=mask), run(x, scale=5.0), run(x), run(x, scale=5.0, mask=~mask)]

    same(capture, program)


def test_globals_and_closures_that_change(capture) -> None:
    global SCALE
    offset = [1.0]

    def f(x):
        return x * SCALE + offset[0]

    @torch.no_grad()
    def program(c):
        global SCALE
        SCALE, offset[0] = 2.0, 1.0
        run, x = c(f), numbers(c.device, 2, 3)
        outs = [run(x)]
        SCALE = 5.0
        outs.append(run(x))
        offset[0] = -3.0
        return [*outs, run(x)]

    same(capture, program)


def test_submodules_added_and_removed(capture) -> None:
    class Chain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = nn.ModuleList([nn.Linear(3, 3)])

        def forward(self, x):
            for part in self.parts:
                x = torch.relu(part(x))
            return x

    @torch.no_grad()
    def program(c):
        torch.manual_seed(2)
        model = Chain().to(c.device)
        run, x = c(model), numbers(c.device, 2, 3)
        outs = [run(x)]
        model.parts.append(nn.Linear(3, 3).to(c.device))
        outs.append(run(x))
        del model.parts[0]
        return [*outs, run(x)]

    same(capture, program)


def test_structured_inputs_and_outputs(capture) -> None:
    def f(batch, *rest, **named):
        return {"sum": batch["a"] + rest[0][0], "rest": [named["z"] * 2, (batch["n"], None)], "text": "x"}

    @torch.no_grad()
    def program(c):
        run, outs = c(f), []
        for i in range(3):
            a, b, z = (numbers(c.device, 2, seed=i + k) for k in range(3))
            outs.append(run({"a": a, "n": i}, [b, "ignored"], z=z))
        return outs

    same(capture, program)


def test_changing_shapes_and_ranks(capture) -> None:
    def f(x, y):
        return (x @ y).softmax(-1) + x.shape[0]

    @torch.no_grad()
    def program(c):
        run = c(f)
        shapes = [(2, 3, 4), (5, 3, 4), (6, 3, 4), (1, 3, 4), (0, 3, 4), (2, 3, 1), (7, 1, 1)]
        return [run(numbers(c.device, m, k, seed=m), numbers(c.device, k, n, seed=n)) for m, k, n in shapes]

    same(capture, program)


def test_sequences_that_grow_by_one(capture) -> None:
    def f(x, cache):
        cache = torch.cat([cache, x], 1)
        return (x @ cache.transpose(1, 2)).softmax(-1) @ cache, cache

    @torch.no_grad()
    def program(c):
        run, cache, outs = c(f), numbers(c.device, 1, 2, 4), []
        for i in range(6):
            out, cache = run(numbers(c.device, 1, 1, 4, seed=i), cache)
            outs.append(out)
        return [*outs, cache]

    same(capture, program)
