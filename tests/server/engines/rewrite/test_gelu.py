"""GELU written out becomes the op, however it is spelled, and nothing else does."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from genie.server.engines.rewrite.gelu import gelu
from tests.server.engines.rewrite.programs import captured, ops, rewrite

C = math.sqrt(2 / math.pi)


def x(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.linspace(-6, 6, 240).view(3, 80).to(dtype)


TANH = {
    "huggingface": lambda x: 0.5 * x * (1.0 + torch.tanh(C * (x + 0.044715 * torch.pow(x, 3.0)))),
    "fast": lambda x: 0.5 * x * (1.0 + torch.tanh(x * 0.7978845608 * (1.0 + 0.044715 * x * x))),
    "cube": lambda x: x * (0.5 * (1 + torch.tanh((x + x * x * x * 0.044715) * C))),
    "halved": lambda x: (1 + torch.tanh(C * (0.044715 * x**3 + x))) * x / 2,
    "square": lambda x: 0.5 * (x * (1 + torch.tanh(C * x * (1 + 0.044715 * x.square())))),
    "bloom": lambda x: x * 0.5 * (1.0 + torch.tanh(0.79788456 * x * (1 + 0.044715 * x * x))),
}
ERF = {
    "original": lambda x: x * 0.5 * (1.0 + torch.erf(x / math.sqrt(2.0))),
    "times": lambda x: 0.5 * x * (torch.erf(x * 0.7071067811865476) + 1),
}


@pytest.mark.parametrize("form", TANH)
def test_the_tanh_form(form: str) -> None:
    changed, graph = rewrite(captured(TANH[form], x()), gelu, rtol=1e-5, atol=2e-6)
    assert changed == 1 and ops(graph) == ["gelu"]
    assert [n.kwargs for n in graph.nodes if n.op == "call_function"] == [{"approximate": "tanh"}]


@pytest.mark.parametrize("form", ERF)
def test_the_erf_form(form: str) -> None:
    changed, graph = rewrite(captured(ERF[form], x()), gelu, rtol=1e-5, atol=2e-6)
    assert changed == 1 and ops(graph) == ["gelu"]
    assert [n.kwargs for n in graph.nodes if n.op == "call_function"] == [{"approximate": "none"}]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", [*TANH, *ERF])
def test_half_precision_comes_no_further_from_the_truth(form: str, dtype: torch.dtype) -> None:
    run = captured((TANH | ERF)[form], x(dtype))
    graph, (chain,) = run.specialized()
    exact = torch.nn.functional.gelu(run.ext[0].double(), approximate="tanh" if form in TANH else "none")
    assert gelu(graph) == 1
    fused = torch.fx.GraphModule({}, graph)(*run.ext)[0]
    assert fused.dtype == dtype and chain is not None
    assert (fused.double() - exact).abs().max() <= (chain.double() - exact).abs().max()


def test_a_computed_input_and_two_chains() -> None:
    def layers(a: Tensor, b: Tensor) -> Tensor:
        return TANH["huggingface"](TANH["huggingface"](a * b + 1) @ b.t())

    changed, graph = rewrite(captured(layers, x(), x().flip(0)), gelu, rtol=1e-4, atol=1e-4)
    assert changed == 2 and ops(graph).count("gelu") == 2 and "tanh" not in ops(graph)


def keeping(x: Tensor) -> tuple[Tensor, Tensor]:
    t = torch.tanh(C * (x + 0.044715 * torch.pow(x, 3.0)))
    return 0.5 * x * (1.0 + t), t


@pytest.mark.parametrize(
    "function",
    [
        keeping,
        lambda x: sum(keeping(x)),  # the tanh is read by someone else as well
        lambda x: 0.5 * x * (1.0 + torch.tanh(C * (x + 0.0447 * torch.pow(x, 3.0)))),
        lambda x: 0.5 * x * (1.0 + torch.tanh(0.8 * (x + 0.044715 * torch.pow(x, 3.0)))),
        lambda x: 0.5 * x * (1.0 + torch.tanh(C * (x + 0.044715 * torch.pow(x, 2.0)))),
        lambda x: 0.5 * x * (1.0 - torch.tanh(C * (x + 0.044715 * torch.pow(x, 3.0)))),
        lambda x: 0.5 * x.flip(0) * (1.0 + torch.tanh(C * (x + 0.044715 * torch.pow(x, 3.0)))),
        lambda x: x * torch.sigmoid(1.702 * x),
        lambda x: 0.5 * x * (1.0 + torch.erf(x)),
        lambda x: 0.5 * x * (1.0 + torch.tanh(C * (x + 0.044715 * torch.pow(x, 3.0)).double())),
        lambda x: torch.tanh(x),
        lambda x: (lambda y: 0.5 * y * (1.0 + torch.erf(y.mul_(1.0) / math.sqrt(2.0))))(x.neg()),
    ],
)
def test_what_is_no_gelu_stays(function) -> None:
    changed, _ = rewrite(captured(function, x()), gelu)
    assert changed == 0
