"""Unmodified models on device genie give the CPU's results."""

from __future__ import annotations

import copy

import pytest
import torch

import genie
from genie.frontend.session import Session
from tests.frontend import models


def ids(batch: int = 2, length: int = 12, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 512, (batch, length), generator=torch.Generator().manual_seed(seed))


def generate(model: torch.nn.Module, device: str, **options: object) -> torch.Tensor:
    prompt = ids().to(device)
    return model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=8,
        do_sample=False,
        pad_token_id=0,
        **options,
    ).cpu()


@pytest.mark.parametrize("build", [models.gpt2, models.llama], ids=["gpt2", "llama"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generate_gives_the_same_tokens(session: Session, build, cache: str) -> None:
    model = build()
    options = {"cache_implementation": "static"} if cache == "static" else {}
    expected = generate(model, "cpu", **options)
    assert torch.equal(generate(copy.deepcopy(model).to("genie"), "genie", **options), expected)


def test_generate_syncs_once_per_token_and_never_before_the_first(session: Session) -> None:
    model = models.gpt2().to("genie")
    prompt = ids(1).to("genie")
    options = {"attention_mask": torch.ones_like(prompt), "do_sample": False, "pad_token_id": 0}
    before = session.recorder.syncs
    model.generate(prompt, min_new_tokens=6, max_new_tokens=6, **options).cpu()
    assert session.recorder.syncs - before == 6 + 1  # one stopping test a token, one final read


def test_a_growing_cache_reuses_templates() -> None:
    with genie.local() as session:
        model = models.gpt2().to("genie")
        for _ in range(2):  # the second request's first program also holds the ops that end the first request
            generate(model, "genie", min_new_tokens=8)
        templates = len(session.executor._templates)
        generate(model, "genie", min_new_tokens=8)
        assert templates <= 4 and len(session.executor._templates) == templates


def test_sampling_and_beams_run(session: Session) -> None:
    model = models.gpt2()
    expected = generate(model, "cpu", num_beams=3)
    assert torch.equal(generate(model.to("genie"), "genie", num_beams=3), expected)


def test_t5_generates_the_same_tokens(session: Session) -> None:
    model = models.t5()
    expected = model.generate(ids(), max_new_tokens=6, do_sample=False)
    got = model.to("genie").generate(ids().to("genie"), max_new_tokens=6, do_sample=False)
    assert torch.equal(got.cpu(), expected)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_bert(session: Session, mode) -> None:
    model = models.bert()
    mask = torch.ones(2, 12, dtype=torch.int64)
    mask[1, 8:] = 0
    with torch.no_grad():
        expected = model(ids(), attention_mask=mask).last_hidden_state
    model.to("genie")
    with mode():
        got = model(ids().to("genie"), attention_mask=mask.to("genie")).last_hidden_state
    torch.testing.assert_close(got.detach().cpu(), expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_clip(session: Session) -> None:
    model = models.clip()
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    text = ids(3, 10)
    expected = model(input_ids=text, pixel_values=pixels)
    got = model.to("genie")(input_ids=text.to("genie"), pixel_values=pixels.to("genie"))
    torch.testing.assert_close(got.logits_per_image.cpu(), expected.logits_per_image, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@torch.no_grad()
def test_resnet(session: Session, layout: torch.memory_format) -> None:
    model = models.resnet18().to(memory_format=layout)
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1)).contiguous(memory_format=layout)
    expected = model(x)
    got = model.to("genie")(x.to("genie"))
    torch.testing.assert_close(got.cpu(), expected, rtol=1e-5, atol=1e-5)


def test_tied_weights_stay_tied(session: Session) -> None:
    model = models.gpt2().to("genie")
    assert model.lm_head.weight is model.transformer.wte.weight
    assert isinstance(model.lm_head.weight, torch.nn.Parameter)
    assert model.lm_head.weight.device == torch.device("genie:0")
    model.to("cpu")
    assert model.lm_head.weight is model.transformer.wte.weight and model.lm_head.weight.device.type == "cpu"


def test_state_dict_round_trip(session: Session) -> None:
    source, target = models.gpt2(), models.gpt2()
    with torch.no_grad():
        for p in target.parameters():
            p.add_(1)
    target.to("genie").load_state_dict(source.state_dict())
    for name, value in target.state_dict().items():
        assert value.device.type == "genie"
        torch.testing.assert_close(value.cpu(), source.state_dict()[name], rtol=0, atol=0)
    source.load_state_dict(target.state_dict())


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW], ids=["sgd", "adamw"])
def test_training_loop_matches_the_cpu(session: Session, optimizer) -> None:
    def train(device: str) -> list[torch.Tensor]:
        torch.manual_seed(3)
        model = torch.nn.Sequential(
            torch.nn.Conv2d(3, 4, 3, bias=False), torch.nn.BatchNorm2d(4), torch.nn.ReLU(),
            torch.nn.Flatten(), torch.nn.Linear(4 * 36, 16),
            torch.nn.LayerNorm(16), torch.nn.GELU(), torch.nn.Linear(16, 5),
        )  # fmt: skip
        model.to(device)
        step = optimizer(model.parameters(), lr=1e-2)
        for i in range(4):
            g = torch.Generator().manual_seed(i)
            x, y = torch.randn(6, 3, 8, 8, generator=g), torch.randint(0, 5, (6,), generator=g)
            step.zero_grad()
            torch.nn.functional.cross_entropy(model(x.to(device)), y.to(device)).backward()
            step.step()
        return [t.detach().cpu() for t in model.state_dict().values()]

    for got, expected in zip(train("genie"), train("cpu"), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
