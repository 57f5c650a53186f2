"""Rotary embedding: fewer kernels, the same bits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from genie.server.engines.rewrite import facts
from genie.server.engines.rewrite.rotary import rotary
from tests.server.engines.rewrite.programs import captured, rewrite


def rotate_half(x: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), dim=-1)


def apply(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    q, k = q.transpose(1, 2), k.transpose(1, 2)
    return q * cos + rotate_half(q) * sin, k * cos + rotate_half(k) * sin


def inputs(batch: int, length: int, dtype: torch.dtype) -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    shapes = (batch, length, 4, 16), (batch, length, 2, 16), (batch, 1, length, 16), (batch, 1, length, 16)
    return [torch.randn(s, generator=g).to(dtype) for s in shapes]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("batch", "length"), [(1, 1), (3, 1), (1, 7), (2, 7)])
def test_queries_and_keys(batch: int, length: int, dtype: torch.dtype) -> None:
    run = captured(lambda *v: [t * 1 for t in apply(*v)], *inputs(batch, length, dtype))
    before = facts.kernels(run.specialized()[0])
    changed, graph = rewrite(run, rotary)
    # Each takes two kernels instead of five; the matrices take two for both.
    assert changed == 2 and before - facts.kernels(graph) == 2 * 3 - 2


def test_the_rotation_of_a_part_and_another_order() -> None:
    def partial(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = k.transpose(1, 2)[..., :16]
        return torch.cat((x * cos + sin * rotate_half(x), k.transpose(1, 2)[..., 16:]), -1)

    q, _, cos, sin = inputs(2, 3, torch.float32)
    k = torch.randn(2, 3, 4, 20, generator=torch.Generator().manual_seed(1))
    assert rewrite(captured(partial, q, k, cos, sin), rotary)[0] == 1


def kept_turned(x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    turned = rotate_half(x)
    return x * cos + turned * sin, turned


@pytest.mark.parametrize(
    "function",
    [
        lambda q, k, cos, sin: kept_turned(q.transpose(1, 2), cos, sin),
        lambda q, k, cos, sin: q * 2 + torch.cat((q[..., 8:], q[..., :8]), -1) * q,  # not negated
        lambda q, k, cos, sin: q * q + torch.cat((-q[..., 4:], q[..., :4]), -1) * q.neg(),  # no halves
        lambda q, k, cos, sin: q * k.repeat(1, 1, 2, 1) + rotate_half(q.neg()) * q,  # of another value
        lambda q, k, cos, sin: q * sin[:, :, :1, :1] + rotate_half(q) * cos[:, :, :1, :1],  # broadcast
    ],
)
def test_what_is_no_rotation_stays(function) -> None:
    changed, _ = rewrite(captured(function, *inputs(1, 5, torch.float32)), rotary)
    assert changed == 0
