"""However a model is spread over a pool, the results are those of one machine."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache

import pytest
import torch
from torch import Tensor, nn

from tests.frontend import models
from tests.runtime.pools import Alternate, Home, Rows, Scatter, handles, pooled


def _ids(batch: int = 4, length: int = 9) -> Tensor:
    return torch.randint(3, 512, (batch, length), generator=torch.Generator().manual_seed(5))


def _noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(6))


def _vit() -> nn.Module:
    from transformers import ViTConfig, ViTModel

    torch.manual_seed(0)
    return ViTModel(
        ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
                  image_size=16, patch_size=8)
    ).eval()  # fmt: skip


def _convnext() -> nn.Module:
    from transformers import ConvNextConfig, ConvNextModel

    torch.manual_seed(0)
    config = ConvNextConfig(hidden_sizes=[8, 16, 16, 32], depths=[1, 1, 1, 1], image_size=32)
    return ConvNextModel(config).eval()


class _Mlp(nn.Sequential):
    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 8))


class _Lstm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.lstm = nn.LSTM(8, 16, batch_first=True)
        self.out = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.lstm(x)[0][:, -1])


def _last(logits: Tensor) -> tuple[Tensor, Tensor]:
    return logits[:, -1], logits.argmax(-1)


Requests = dict[str, tuple[Callable[[], nn.Module], tuple[Tensor, ...], Callable[..., tuple]]]
_REQUESTS: Requests = {
    "gpt2": (models.gpt2, (_ids(),), lambda m, x: _last(m(x).logits)),
    "llama": (models.llama, (_ids(),), lambda m, x: (m(x).logits,)),
    "t5": (models.t5, (_ids(), _ids(4, 5)), lambda m, x, y: (m(input_ids=x, decoder_input_ids=y).logits,)),
    "bert": (models.bert, (_ids(),), lambda m, x: (m(x).last_hidden_state, m(x).pooler_output)),
    "vit": (_vit, (_noise(4, 3, 16, 16),), lambda m, x: (m(x).last_hidden_state,)),
    "resnet": (models.resnet18, (_noise(4, 3, 32, 32),), lambda m, x: (m(x),)),
    "convnext": (_convnext, (_noise(4, 3, 32, 32),), lambda m, x: (m(x).last_hidden_state,)),
    "clip": (
        models.clip,
        (_noise(4, 3, 32, 32), _ids(3, 6)),
        lambda m, p, t: (m(pixel_values=p, input_ids=t).logits_per_image,),
    ),
    "mlp": (_Mlp, (_noise(4, 16),), lambda m, x: (m(x).softmax(-1),)),
    "lstm": (_Lstm, (_noise(4, 5, 8),), lambda m, x: (m(x),)),
}
_POLICIES = {
    "scatter": lambda: Scatter(1),
    "alternate": lambda: Alternate(5),
    "1+3": lambda: Rows(1, 3),
    "1+2+1": lambda: Rows(1, 2, 1),
    "2+2, joined and divided": lambda: Rows(2, 2, alone=0.15),
}


@cache
def _expected(name: str) -> tuple[nn.Module, tuple[Tensor, ...]]:
    build, inputs, request = _REQUESTS[name]
    with torch.no_grad():
        model = build().eval()
        return model, request(model, *inputs)


def _check(got: tuple, expected: tuple) -> None:
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("policy", _POLICIES)
@pytest.mark.parametrize("name", _REQUESTS)
@torch.no_grad()
def test_results_are_those_of_one_machine(trio, name: str, policy: str) -> None:
    model, expected = _expected(name)
    _, inputs, request = _REQUESTS[name]
    chosen = _POLICIES[policy]()
    with pooled(trio, chosen) as pool:
        there = copy.deepcopy(model).to("genie")
        for _ in range(3):
            _check(request(there, *[x.to("genie") for x in inputs]), expected)
        planned = pool.planned
        _check(request(there, *[x.to("genie") for x in inputs]), expected)
        assert pool.planned == planned, "an identical request was planned anew"
        if isinstance(chosen, Rows):
            # An LSTM is recorded as one op that may draw random numbers.
            assert chosen.splits or name == "lstm", chosen.refusals
        del there
        assert handles(pool) == [0, 0, 0]


@pytest.mark.parametrize("policy", ["alternate", "1+3", "2+2, joined and divided"])
@pytest.mark.parametrize("name", ["gpt2", "bert", "resnet", "mlp"])
@torch.no_grad()
def test_compiled_segments_give_the_same(trio, name: str, policy: str) -> None:
    model, expected = _expected(name)
    _, inputs, request = _REQUESTS[name]
    with pooled(trio[:2] if "+" in policy else trio, _POLICIES[policy](), replay=True) as pool:
        there = copy.deepcopy(model).to("genie")
        for _ in range(4):
            _check(request(there, *[x.to("genie") for x in inputs]), expected)
        planned = pool.planned
        _check(request(there, *[x.to("genie") for x in inputs]), expected)
        assert pool.planned == planned
        assert sum(r.ops for link in pool.links for r in link.usage.receipts) > 0


def _generate(model: nn.Module, device: str, **options: object) -> Tensor:
    prompt = _ids(4, 7).to(device)
    mask = torch.ones_like(prompt)
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0} | options
    return model.generate(prompt, attention_mask=mask, **options).cpu()


@pytest.mark.parametrize("policy", ["home", "scatter", "alternate", "1+3"])
@pytest.mark.parametrize("cache_kind", ["dynamic", "static"])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_generate_gives_the_same_tokens(trio, name: str, cache_kind: str, policy: str) -> None:
    model, _ = _expected(name)
    options = {"cache_implementation": "static"} if cache_kind == "static" else {}
    expected = _generate(model, "cpu", **options)
    with pooled(trio[:2], Home() if policy == "home" else _POLICIES[policy]()) as pool:
        there = copy.deepcopy(model).to("genie")
        for _ in range(2):
            assert torch.equal(_generate(there, "genie", **options), expected)
        if policy == "home":
            planned = pool.planned
            assert torch.equal(_generate(there, "genie", **options), expected)
            assert pool.planned <= planned + 1  # the first window of a request also ends the one before


def test_t5_generates_the_same_tokens(trio) -> None:
    model, _ = _expected("t5")
    options = {"max_new_tokens": 5, "do_sample": False}
    expected = model.generate(_ids(), **options)
    for policy in (Alternate(7), Scatter(3)):
        with pooled(trio, policy):
            assert torch.equal(
                copy.deepcopy(model).to("genie").generate(_ids().to("genie"), **options).cpu(), expected
            )
