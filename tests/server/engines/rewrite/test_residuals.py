"""Products are added to a residual stream in place, where nobody else looks at it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from genie.server.engines.rewrite import facts
from genie.server.engines.rewrite.residuals import residuals
from tests.server.engines.rewrite.programs import captured, ops, rewrite


def inputs(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    return [torch.randn(s, generator=g).to(dtype) for s in ((2, 3, 16), (16, 32), (32, 16))]


def layers(x: Tensor, v: Tensor, w: Tensor) -> Tensor:
    x = x.neg()
    for _ in range(2):
        x = x + F.linear(F.silu(F.linear(F.rms_norm(x, [16]), w)), v)
    return F.rms_norm(x, [16])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_residual_stream_is_added_to_in_place(dtype: torch.dtype) -> None:
    run = captured(layers, *inputs(dtype))
    before = facts.kernels(run.specialized()[0])
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 4e-2}[dtype]
    changed, graph = rewrite(run, residuals, rtol=tolerance, atol=tolerance)
    assert changed == 2 and before - facts.kernels(graph) == 2
    assert ops(graph).count("addmm_") == 2 and "add" not in ops(graph)


def test_the_product_may_stand_first_and_the_sum_be_kept() -> None:
    run = captured(lambda x, v, w: F.linear(F.linear(x, w), v) + x.neg(), *inputs())
    assert rewrite(run, residuals, rtol=1e-5, atol=1e-5)[0] == 1


def read_later(x: Tensor, v: Tensor, w: Tensor) -> Tensor:
    r = x.neg()
    return (r + F.linear(F.linear(x, w), v)) * r


def view_read_later(x: Tensor, v: Tensor, w: Tensor) -> Tensor:
    r = x.neg()
    part = r[:, 1]
    return (r + F.linear(F.linear(x, w), v))[:, 0] * part


def kept_residual(x: Tensor, v: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    r = x.neg()
    return r, r + F.linear(F.linear(x, w), v)


def own_input(x: Tensor, v: Tensor, w: Tensor) -> Tensor:
    r = x.neg()
    return r + F.linear(r, w[:16])


@pytest.mark.parametrize(
    "function",
    [
        read_later,
        view_read_later,
        kept_residual,
        own_input,  # the product would read what it writes
        lambda x, v, w: x + F.linear(F.linear(x, w), v),  # came from outside
        lambda x, v, w: x.neg() + F.linear(F.linear(x, w), v, v[:, 0]),  # a bias
        lambda x, v, w: x.neg()[0, :1] + F.linear(F.linear(x, w), v),  # broadcast
        lambda x, v, w: x.neg()[0] + F.linear(F.linear(x[:1], w), v),
        lambda x, v, w: torch.add(x.neg(), F.linear(F.linear(x, w), v), alpha=2),
        lambda x, v, w: (lambda y: x.neg() + y + y.sum())(F.linear(F.linear(x, w), v)),
        lambda x, v, w: x.neg().double() + F.linear(F.linear(x, w), v),
    ],
)
def test_any_other_sum_stays(function) -> None:
    changed, _ = rewrite(captured(function, *inputs()), residuals)
    assert changed == 0
