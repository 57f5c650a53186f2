"""Norms written out become the op; near misses stay."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from genie.server.engines.rewrite.norms import norms
from tests.server.engines.rewrite.programs import captured, ops, rewrite

HALVES = [torch.float16, torch.bfloat16]
DTYPES = [torch.float32, *HALVES]


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2, 5, 48, generator=g) * 3 + 1
    return x.to(dtype), torch.randn(48, generator=g).to(dtype), torch.randn(48, generator=g).to(dtype)


def llama(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    h = x.to(torch.float32)
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)
    return w * h.to(x.dtype)


def t5(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    h = x * torch.rsqrt(x.to(torch.float32).pow(2).mean(-1, keepdim=True) + 1e-6)
    return w * (h.to(w.dtype) if w.dtype != torch.float32 else h)


def divided(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    h = x.float()
    return (h / torch.sqrt((h * h).mean(-1, keepdim=True) + 1e-5)).to(x.dtype) * w


def powered(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    h = x.float()
    return ((h.square().mean(2, keepdim=True) + 1e-5).pow(-0.5) * h).to(x.dtype) * w


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("function", [llama, t5, divided, powered])
def test_rms_norm(function, dtype: torch.dtype) -> None:
    eps = torch.finfo(dtype).eps
    run = captured(function, *inputs(dtype))
    changed, graph = rewrite(run, norms, rtol=2 * eps, atol=eps)
    left = ops(graph)
    assert changed == 1 and left.count("rms_norm") == 1 and "mean" not in left and "mul" not in left
    assert dtype == torch.float32 or left == ["rms_norm"]


@pytest.mark.parametrize("dtype", HALVES)
def test_rms_norm_in_half_precision_comes_no_further_from_the_truth(dtype: torch.dtype) -> None:
    run = captured(llama, *inputs(dtype))
    graph, (chain,) = run.specialized()
    h = inputs(dtype)[0].double()
    exact = inputs(dtype)[1].double() * h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)
    assert norms(graph) == 1 and chain is not None
    fused = torch.fx.GraphModule({}, graph)(*run.ext)[0]
    assert (fused.double() - exact).abs().mean() <= (chain.double() - exact).abs().mean()


def test_rms_norm_without_a_weight() -> None:
    run = captured(lambda x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6), inputs()[0])
    changed, graph = rewrite(run, norms, rtol=1e-6, atol=1e-6)
    assert changed == 1 and ops(graph) == ["rms_norm"]


def test_a_weight_of_another_dtype_stays_outside() -> None:
    def gemma(x: Tensor, w: Tensor) -> Tensor:
        h = x.float()
        return (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6) * (1.0 + w.float())).to(x.dtype)

    x, w, _ = inputs(torch.bfloat16)
    changed, graph = rewrite(captured(gemma, x, w), norms, rtol=1e-2, atol=1e-2)
    assert changed == 1 and ops(graph).count("rms_norm") == 1 and "rsqrt" not in ops(graph)


def spelled(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    d = x - x.mean(-1, keepdim=True)
    return d * torch.rsqrt(d.pow(2).mean(-1, keepdim=True) + 1e-5) * w + b


def by_variance(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    v = x.var(-1, unbiased=False, keepdim=True)
    return w * ((x - x.mean(-1, keepdim=True)) / torch.sqrt(v + 1e-5)) + b


@pytest.mark.parametrize("function", [spelled, by_variance])
def test_layer_norm(function) -> None:
    changed, graph = rewrite(captured(function, *inputs()), norms, rtol=1e-5, atol=2e-6)
    assert changed == 1 and ops(graph) == ["layer_norm"]


def test_layer_norm_without_a_bias_or_weight() -> None:
    def plain(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        d = x - x.mean(-1, keepdim=True)
        n = d / torch.sqrt(d.pow(2).mean(-1, keepdim=True) + 1e-5)
        e = n - n.mean(-1, keepdim=True)
        return n.neg(), w * (e / torch.sqrt((e * e).mean(-1, keepdim=True) + 1e-5))

    x, w, _ = inputs()
    changed, graph = rewrite(captured(plain, x, w), norms, rtol=1e-5, atol=2e-6)
    assert changed == 2 and sorted(ops(graph)) == ["layer_norm", "layer_norm", "neg"]


def keeping(x: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    r = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
    return x * r * w, r


@pytest.mark.parametrize(
    "function",
    [
        keeping,
        lambda x, w, b: x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + 1e-6),  # not the last dimension
        lambda x, w, b: x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) + 1e-6),  # not the mean
        lambda x, w, b: x * torch.rsqrt(x.pow(3).mean(-1, keepdim=True).abs() + 1e-6),
        lambda x, w, b: b * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6),  # of another value
        lambda x, w, b: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True)),  # no eps
        lambda x, w, b: (x - x.mean(-1, True)) / torch.sqrt(x.var(-1, keepdim=True) + 1e-5),  # unbiased
        lambda x, w, b: (x - b) / torch.sqrt(x.var(-1, unbiased=False, keepdim=True) + 1e-5) * w,
    ],
)
def test_what_is_no_norm_stays(function) -> None:
    changed, _ = rewrite(captured(function, *inputs()), norms)
    assert changed == 0


def test_squares_rounded_to_half_stay() -> None:
    """They overflow above 256, which a norm in float32 does not."""
    x = inputs(torch.float16)[0]
    run = captured(lambda x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6), x)
    assert rewrite(run, norms)[0] == 0
