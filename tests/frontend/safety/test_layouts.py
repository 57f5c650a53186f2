"""Dtypes and memory formats: conversions after the first calls, and the strides that result."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.frontend.safety.compare import assert_same, counting, numbers, same


def strides(*tensors: torch.Tensor) -> list:
    return [(t.stride(), t.is_contiguous(memory_format=torch.channels_last)) for t in tensors]


def convnet(device: str) -> nn.Module:
    torch.manual_seed(1)
    layers = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 2, 1)
    return nn.Sequential(*layers).to(device).eval()


@torch.no_grad()
def test_channels_last_given_and_taken_back(capture) -> None:
    def program(c):
        model = convnet(c.device)
        run, x, outs = c(model), numbers(c.device, 2, 3, 8, 8), []
        for form in (torch.contiguous_format, torch.channels_last, torch.contiguous_format):
            model.to(memory_format=form)
            for _ in range(3):
                y = run(x.contiguous(memory_format=form))
                outs += [y, strides(y, model[0].weight)]
        return outs

    same(capture, program)


def test_training_in_channels_last(capture) -> None:
    def program(c):
        model = convnet(c.device).to(memory_format=torch.channels_last).train()
        run, outs = c(model), []
        for i in range(2):
            x = numbers(c.device, 2, 3, 8, 8, seed=i).contiguous(memory_format=torch.channels_last)
            y = run(x.requires_grad_())
            y.square().mean().backward()
            outs += [y, strides(y), x.grad]
        return [*outs, *(p.grad for p in model.parameters())]

    same(capture, program)


@torch.no_grad()
def test_inputs_of_other_strides_than_the_first(capture) -> None:
    def f(x):
        return x * 2, x.contiguous(), x.clone(), torch.empty_like(x).fill_(1), x.to(torch.float64)

    def program(c):
        run, outs = c(f), []
        for make in (
            lambda t: t,
            lambda t: t.transpose(1, 3),
            lambda t: t.contiguous(memory_format=torch.channels_last),
            lambda t: t[:, ::2],
            lambda t: t.expand(2, 3, 4, 4)[:, :, 1:],
        ):
            result = run(make(counting(c.device, 1, 3, 4, 4)))
            outs += [result, strides(*result)]
        return outs

    same(capture, program)


@torch.no_grad()
def test_view_fails_where_it_fails_on_the_cpu(capture) -> None:
    def program(c):
        run = c(lambda t: t.view(-1))
        outs = [run(counting(c.device, 2, 3))]
        try:
            run(counting(c.device, 2, 3).t())
        except RuntimeError as exc:
            outs.append("view" in str(exc))  # Dynamo words it otherwise
        return [*outs, run(counting(c.device, 3, 2))]

    same(capture, program)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@torch.no_grad()
def test_a_model_converted_after_the_first_calls(capture, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    remote = nn.Sequential(nn.Linear(4, 4), nn.ReLU()).to("genie")
    remote.load_state_dict(model.state_dict())
    run, x = capture(remote), numbers("cpu", 2, 4)
    torch.testing.assert_close(run(x.to("genie")).cpu(), model(x))
    model.to(dtype)
    remote.to(dtype)
    assert remote[0].weight.dtype == dtype
    # Low-precision sums round by the order of a kernel's additions: PyTorch's own tolerances per dtype.
    torch.testing.assert_close(run(x.to("genie", dtype)).cpu(), model(x.to(dtype)))
    model.float()
    remote.float()
    assert_same(run(x.to("genie")), model(x))


@torch.no_grad()
def test_casts_and_promotion(capture) -> None:
    def f(x, y):
        return (
            x + y,
            x * 2,
            x / 2,
            x // 2,
            (x > 1).sum(),
            torch.where(x > 0, x, y),
            x.mean(dtype=torch.float64),
        )

    def program(c):
        run, outs = c(f), []
        for a, b in (
            (torch.int32, torch.int64), (torch.float32, torch.float64), (torch.int64, torch.float32),
            (torch.uint8, torch.int8), (torch.float16, torch.float32),
        ):  # fmt: skip
            outs.append(run(counting(c.device, 4).to(a), counting(c.device, 4).to(b)))
        return outs

    same(capture, program)


@torch.no_grad()
def test_view_as_another_dtype_and_complex_numbers(capture) -> None:
    def f(x):
        z = torch.view_as_complex(x.view(2, 2))
        return x.view(torch.int32), torch.view_as_real(z * z), z.abs(), z.real

    def program(c):
        run = c(f)
        return [run(numbers(c.device, 4, seed=i)) for i in range(2)]

    same(capture, program)


@torch.no_grad()
def test_layout_changing_ops_in_a_row(capture) -> None:
    def f(x):
        y = x.permute(0, 2, 3, 1).flatten(1, 2)
        y = nn.functional.layer_norm(y, (3,)).transpose(1, 2).unflatten(2, (4, 4))
        heads = y.reshape(2, 3, 16).transpose(1, 2).reshape(2, 16, 3, 1).transpose(1, 2)
        attended = nn.functional.scaled_dot_product_attention(heads, heads, heads)
        return y, heads, attended.transpose(1, 2).reshape(2, 16, 3)

    def program(c):
        run, outs = c(f), []
        for i in range(2):
            result = run(numbers(c.device, 2, 3, 4, 4, seed=i))
            outs += [result, strides(result[0])]
        return outs

    same(capture, program)


@torch.no_grad()
def test_an_out_argument_of_the_final_shape(capture) -> None:
    def program(c):
        run = c(lambda a, b, out: torch.mul(a, b, out=out))
        out = torch.empty(3, device=c.device)
        first = run(counting(c.device, 3), counting(c.device, 3), out)
        return first, out, first is out

    same(capture, program)


def test_an_out_argument_of_another_shape_is_refused_with_the_remedy(remote) -> None:
    a = counting("genie", 3)
    with pytest.raises(RuntimeError, match="of the final shape"):
        torch.add(a, a, out=torch.empty(7, device="genie"))
    assert (a + 1).tolist() == [1, 2, 3]
