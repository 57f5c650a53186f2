"""Hugging Face `generate()` with growing, static and reordered caches gives the CPU's tokens."""

from __future__ import annotations

import copy

import pytest
import torch

from tests.frontend import models

BUILD = {"gpt2": models.gpt2, "llama": models.llama}


def prompt(batch: int = 2, length: int = 9) -> torch.Tensor:
    return torch.randint(3, 512, (batch, length), generator=torch.Generator().manual_seed(0))


def left_padded() -> tuple[torch.Tensor, torch.Tensor]:
    ids = prompt(3)
    mask = torch.ones_like(ids)
    mask[0, :4], mask[2, :7] = 0, 0
    return ids.masked_fill(mask == 0, 0), mask


def tokens(model, device: str, ids=None, mask=None, **options) -> torch.Tensor:
    ids = prompt() if ids is None else ids
    mask = torch.ones_like(ids) if mask is None else mask
    return model.generate(
        ids.to(device), attention_mask=mask.to(device), max_new_tokens=6, pad_token_id=0, **options
    ).cpu()


@pytest.fixture
def pair(request: pytest.FixtureRequest, capture, mode: str):
    """The same model on the CPU and on device genie; its forward goes through the mode under test."""
    model = BUILD[getattr(request, "param", "gpt2")](layers=1)
    remote = copy.deepcopy(model).to("genie")
    if mode == "compiled":
        remote.forward = capture(remote.forward)
    return model, remote


def on(*modes: str) -> pytest.MarkDecorator:
    """The modes of a test here: compiling a model takes seconds, and what replay makes of plain greedy
    decoding its own tests say."""
    return pytest.mark.parametrize("mode", modes, indirect=True)


each_model = pytest.mark.parametrize("pair", BUILD, indirect=True)


@on("lazy-remote")
@each_model
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_greedy_tokens(pair, cache: str) -> None:
    check_greedy(pair, cache)


@on("compiled")
@pytest.mark.parametrize("pair, cache", [("gpt2", "static"), ("llama", "dynamic")], indirect=["pair"])
def test_greedy_tokens_of_a_compiled_model(pair, cache: str) -> None:
    check_greedy(pair, cache)


def check_greedy(pair, cache: str) -> None:
    options = {"do_sample": False} | ({"cache_implementation": "static"} if cache == "static" else {})
    expected = tokens(pair[0], "cpu", **options)
    assert torch.equal(tokens(pair[1], "genie", **options), expected)
    assert torch.equal(tokens(pair[1], "genie", **options), expected)


@on("lazy-remote", "automatic")
def test_a_batch_with_left_padding(pair) -> None:
    ids, mask = left_padded()
    expected = tokens(pair[0], "cpu", ids, mask, do_sample=False)
    assert torch.equal(tokens(pair[1], "genie", ids, mask, do_sample=False), expected)


@on("lazy-remote", "automatic")
def test_beam_search_reorders_the_cache(pair) -> None:
    options = {"num_beams": 3, "do_sample": False, "length_penalty": 0.5}
    assert torch.equal(tokens(pair[1], "genie", **options), tokens(pair[0], "cpu", **options))


@on("lazy-remote")
def test_sampling_follows_the_seed(pair) -> None:
    options = {"do_sample": True, "temperature": 0.9, "top_k": 40, "top_p": 0.95}
    torch.manual_seed(17)
    expected = tokens(pair[0], "cpu", **options)
    drawn = []
    for seed in (17, 18, 17):
        torch.manual_seed(seed)
        drawn.append(tokens(pair[1], "genie", **options))
    assert torch.equal(drawn[0], expected) and torch.equal(drawn[2], expected)
    assert not torch.equal(drawn[1], expected)


@on("lazy-remote")
def test_logits_processors_and_stopping_at_eos(pair) -> None:
    first = tokens(pair[0], "cpu", do_sample=False)
    options = {
        "do_sample": False,
        "repetition_penalty": 1.3,
        "no_repeat_ngram_size": 2,
        "eos_token_id": int(first[0, -3]),
        "bad_words_ids": [[int(first[1, -1])]],
        "min_new_tokens": 2,
    }
    assert torch.equal(tokens(pair[1], "genie", **options), tokens(pair[0], "cpu", **options))


@on("lazy-remote")
@each_model
@torch.no_grad()
def test_a_cache_carried_from_call_to_call(pair) -> None:
    from transformers import DynamicCache

    def steps(model, device: str) -> list[torch.Tensor]:
        cache, ids, logits = DynamicCache(config=model.config), prompt().to(device), []
        for _ in range(4):
            out = model(ids, past_key_values=cache, use_cache=True)
            logits.append(out.logits[:, -1])
            ids = logits[-1].argmax(-1, keepdim=True)
        assert cache.get_seq_length() == 12
        cache.crop(-7)
        out = model(ids, past_key_values=cache, use_cache=True)
        return [*logits, out.logits[:, -1]]

    for got, expected in zip(steps(pair[1], "genie"), steps(pair[0], "cpu"), strict=True):
        torch.testing.assert_close(got.cpu(), expected, rtol=1e-5, atol=1e-5)
