"""Unmodified ``generate()`` of real architectures, with replay: tokens are local ones, and engines did it."""

from __future__ import annotations

import copy

import pytest
import torch

from genie.server.engines import select
from tests.frontend import models
from tests.server.engines.serving import counters, prompt, session, tokens

NEW = 20
MODELS = {"gpt2": models.gpt2, "llama": models.llama, "t5": models.t5}
#: generating costs seconds before it is compiled for replay: one session for all that a model is asked
pytestmark = pytest.mark.timeout(240)


@pytest.mark.parametrize("name", MODELS)
def test_greedy_generation(serving, name):
    model = MODELS[name]()
    ids = [prompt(seed) for seed in (0, 1)]
    with torch.no_grad():
        expected = [tokens(model, i, "cpu", NEW) for i in ids]
        searched = tokens(model, ids[0], "cpu", 8, num_beams=3)
    with session(serving) as opened:
        remote = copy.deepcopy(model).to("genie")
        for i, wanted in zip([*ids, ids[0]], [*expected, expected[0]], strict=True):
            assert torch.equal(tokens(remote, i, "genie", NEW), wanted)
        seen = counters(opened)
        assert torch.equal(tokens(remote, ids[0], "genie", 8, num_beams=3), searched)
        assert torch.equal(tokens(remote, ids[1], "genie", NEW), expected[1])
        after = counters(opened)
        decoding = max(
            variant.counters.get("rewritten", 0) for lane in serving.lanes() for variant in lane.variants
        )
    assert not seen["engine_failed"] and not after["engine_failed"]
    assert seen["rewritten"] >= 2 * (NEW - 4) * decoding, "most steps of three generations"
    assert after["rewritten"]
    if serving.device.graphs is not None:
        assert seen["engine_graph"] >= 2 * (NEW - 4)


@pytest.mark.parametrize("name", ["gpt2"])
def test_a_batch_with_padding(serving, name):
    model = MODELS[name]()
    ids = prompt(batch=2)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    with torch.no_grad():
        expected = tokens(model, ids, "cpu", NEW, attention_mask=mask)
    with session(serving) as opened:
        remote = copy.deepcopy(model).to("genie")
        for _ in range(2):
            assert torch.equal(tokens(remote, ids, "genie", NEW, attention_mask=mask), expected)
        seen = counters(opened)
    assert seen["rewritten"] and not seen["engine_failed"]


def test_off_is_off(graphs, monkeypatch):
    """``engines=()``, which is what ``--genie-ablate compiled`` asks for."""
    made = []
    monkeypatch.setattr(select.Engines, "_variant", lambda *_: made.append(1))
    model = models.gpt2(layers=1)
    with torch.no_grad():
        expected = tokens(model, prompt(), "cpu", 12)
    with session(graphs, engines=(), replay=False) as opened:
        assert torch.equal(tokens(copy.deepcopy(model).to("genie"), prompt(), "genie", 12), expected)
        seen = counters(opened)
    assert not made and not {"rewritten", "engine_graph", "engine_compiled", "engine_failed"} & set(seen)
