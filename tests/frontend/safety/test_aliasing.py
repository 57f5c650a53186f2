"""Inputs that overlap, outputs that alias, views of views, and writes through all of them."""

from __future__ import annotations

import pytest
import torch

from tests.frontend.safety.compare import counting, numbers, same


def add_into_first(a, b):
    a.add_(b)
    return a * 2, b + 1


def both_written(a, b):
    a.mul_(2)
    b.sub_(1)
    return a + b


def reads_after_write(a, b):
    before = b.sum()
    a[0] = 100.0
    return before, b.sum(), a.clone()


def swaps(a, b):
    saved = a.clone()
    a.copy_(b)
    b.copy_(saved)
    return a + 0, b + 0


def pair(kind: str, device: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(owner of the memory, a, b): a and b are 3 x 3 and overlap as ``kind`` says."""
    if kind == "apart":
        base = counting(device, 6, 3)
        return base, base[:3], base[3:]
    if kind == "one tensor twice":
        base = counting(device, 3, 3)
        return base, base, base
    if kind == "two views of one":
        base = counting(device, 3, 3)
        return base, base[:], base.view(3, 3)
    if kind == "transposed":
        base = counting(device, 3, 3)
        return base, base, base.t()
    if kind == "separate":
        base = counting(device, 3, 3)
        return base, base, counting(device, 3, 3) + 50
    base = counting(device, 4, 3)
    return base, base[:3], base[1:]


KINDS = ["apart", "one tensor twice", "two views of one", "transposed", "separate", "shifted"]


@pytest.mark.parametrize("f", [both_written, reads_after_write])
def test_inputs_that_overlap(capture, f) -> None:
    @torch.no_grad()
    def program(c):
        run, outs = c(f), []
        for kind in (*KINDS, *KINDS):
            base, a, b = pair(kind, c.device)
            outs += [run(a, b), base]
        return outs

    same(capture, program)


@pytest.mark.parametrize("f", [add_into_first, swaps])
def test_inputs_that_are_one_or_apart(capture, f) -> None:
    # An op over partly overlapping tensors is undefined in PyTorch itself: only these may be compared.
    @torch.no_grad()
    def program(c):
        run, outs = c(f), []
        for kind in ("separate", "one tensor twice", "apart", "two views of one", "separate"):
            base, a, b = pair(kind, c.device)
            outs += [run(a, b), base]
        return outs

    same(capture, program)


@pytest.mark.parametrize("f", [add_into_first, both_written, swaps])
def test_a_first_call_with_overlap_does_not_decide_for_later_ones(capture, f) -> None:
    @torch.no_grad()
    def program(c):
        run, outs = c(f), []
        for kind in ("one tensor twice", "separate", "two views of one", "apart"):
            base, a, b = pair(kind, c.device)
            outs += [run(a, b), base]
        return outs

    same(capture, program)


def view_of_input(x):
    return x[1:], x.t()


def input_itself(x):
    return x, x


def output_and_its_view(x):
    y = x * 2
    return y, y[0], y.view(-1)


def written_input(x):
    return x.add_(1), x[0]


def one_output_twice(x):
    y = x + 1
    return y, y


def detached_alias(x):
    return x.detach(), x.view_as(x)


@pytest.mark.parametrize(
    "f", [view_of_input, input_itself, output_and_its_view, written_input, one_output_twice, detached_alias]
)
def test_outputs_that_alias_are_written_through(capture, f) -> None:
    @torch.no_grad()
    def program(c):
        run, outs = c(f), []
        for _ in range(3):
            x = counting(c.device, 3, 3)
            first, second, *_ = run(x)
            first.mul_(10)
            outs += [x.clone(), first.clone(), second.clone()]
            second.add_(0.5)
            outs += [x, first, second]
        return outs

    same(capture, program)


def test_an_output_that_is_an_input_is_the_same_object(capture) -> None:
    def f(x, y):
        return x, y + 1

    @torch.no_grad()
    def program(c):
        run, answers = c(f), []
        for _ in range(3):
            x, y = counting(c.device, 2), counting(c.device, 2)
            out, _ = run(x, y)
            answers.append(out is x)
        return answers

    same(capture, program)


def test_results_of_earlier_calls_stay_as_they_were(capture) -> None:
    def f(x):
        return x * 2, x.sum()

    @torch.no_grad()
    def program(c):
        run = c(f)
        outs = [run(numbers(c.device, 3, seed=i)) for i in range(4)]
        outs[0][0].zero_()
        outs[2][0].add_(outs[1][0])
        return [*outs, run(numbers(c.device, 3, seed=9))]

    same(capture, program)


def test_an_output_fed_back_as_the_next_input(capture) -> None:
    def f(x):
        x.mul_(1.5)
        return x[1:] + x[:-1], x

    @torch.no_grad()
    def program(c):
        run, x, outs = c(f), counting(c.device, 8), []
        for _ in range(5):
            y, x_again = run(x)
            outs += [y, x_again, x]
            x = y
        return outs

    same(capture, program)


def test_views_of_views_and_writes_through_them(capture) -> None:
    def f(x):
        a = x.view(2, 3, 4)
        b = a.transpose(0, 2)[1:, :, 0]
        d = b.unsqueeze(0).expand(2, 3, 3)
        b[0, 1] = -1
        a[1].select(0, 2).add_(100)
        x[3:9].view(2, 3).t().mul_(2)
        return x, b, d.sum(0), a.permute(2, 0, 1).reshape(-1), x.unfold(0, 4, 3)

    @torch.no_grad()
    def program(c):
        run, outs = c(f), []
        for _ in range(3):
            x = counting(c.device, 24)
            outs += [run(x), x]
        return outs

    same(capture, program)


def test_as_strided_of_views(capture) -> None:
    def f(x):
        y = x[4:]
        z = y.as_strided((3, 3), (3, 1), 2)  # offsets count from the storage, not from the view
        z[1].fill_(-5)
        diagonal = y.as_strided((4,), (5,))
        return z, x, diagonal, torch.as_strided(x, (2, 2), (6, 1), 1) + 1

    @torch.no_grad()
    def program(c):
        run, outs = c(f), []
        for _ in range(2):
            x = counting(c.device, 24)
            outs += [run(x), x]
        return outs

    same(capture, program)


def test_strides_and_offsets_are_those_of_the_cpu(capture) -> None:
    def geometry(t):
        return tuple(t.shape), t.stride(), t.storage_offset(), t.is_contiguous()

    def f(x):
        return x.t(), x[1:, ::2], x.view(2, 2, 6).permute(2, 0, 1), x.expand(2, 4, 6), x.narrow(1, 2, 3)

    @torch.no_grad()
    def program(c):
        run = c(f)
        return [[geometry(t) for t in run(counting(c.device, 4, 6))] for _ in range(2)]

    same(capture, program)


@pytest.mark.parametrize("form", ["index_put_", "masked", "slice", "scatter_", "add_out", "ellipsis"])
def test_writes_by_index(capture, form: str) -> None:
    def f(x, i, value):
        if form == "index_put_":
            x[i] = value
        elif form == "masked":
            x[x > 3] = value
        elif form == "slice":
            x[1:5:2] += value
        elif form == "scatter_":
            x.scatter_(0, i, value)
        elif form == "add_out":
            torch.add(x, value, out=x)
        else:
            x[..., -1] = value
        return x * 1

    @torch.no_grad()
    def program(c):
        run, outs = c(f), []
        for value in (7.0, -2.0, 7.0):
            x, i = counting(c.device, 8), torch.tensor([1, 6]).to(c.device)
            outs += [run(x, i, value), x]
        return outs

    same(capture, program)


def test_an_input_written_by_an_op_on_its_own_view(capture) -> None:
    def f(x):
        x[1:].copy_(x[:-1].clone())
        x.t_()
        x.squeeze_()
        return x

    @torch.no_grad()
    def program(c):
        run = c(f)
        return [run(counting(c.device, 3, 4)) for _ in range(3)]

    same(capture, program)


def test_a_result_survives_a_later_write_to_its_input(capture) -> None:
    @torch.no_grad()
    def program(c):
        run, x = c(lambda t: (t + 1, t.clone(), t.reshape(2, 6))), counting(c.device, 12)
        total, copy, view = run(x)
        x.zero_()
        return total, copy, view

    same(capture, program)
