"""All rewrites on real models: the same values, and the chains found that the models have."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor, fx

from genie.server.engines.rewrite import PASSES, facts, rewritten
from genie.server.engines.specialize import NotSpecializableError
from tests.frontend import models
from tests.server.engines.rewrite.programs import Run, assert_kept, captured, decoded, execute

LAYERS = 2


def ids(batch: int = 2, length: int = 12) -> Tensor:
    return torch.randint(3, 512, (batch, length), generator=torch.Generator().manual_seed(0))


def vit() -> torch.nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=64, num_hidden_layers=LAYERS, num_attention_heads=4, intermediate_size=128, image_size=32,
        patch_size=8, num_labels=10,
    )  # fmt: skip
    return ViTForImageClassification(config).eval()


def lively(build: Callable[[], torch.nn.Module], dtype: torch.dtype) -> torch.nn.Module:
    """With activations around one, not around 0.02, so that a wrong formula shows."""
    model = build()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 2 and build is not models.t5:  # which starts lively
                p.mul_(5)
            p.copy_(p.bfloat16())
    return model.to(dtype)


def prefill(build: Callable[[], torch.nn.Module], dtype: torch.dtype) -> Run:
    """As `generate` does it: the cache, and what the last position says."""

    def call(model: torch.nn.Module, prompt: Tensor) -> list[Tensor]:
        out = model(prompt, use_cache=True, logits_to_keep=1)
        cached = [t for layer in out.past_key_values.layers for t in (layer.keys, layer.values)]
        return [out.logits[:, -1].float().softmax(-1), *cached]

    return captured(call, lively(build, dtype), ids())


def encoder_decoder(build: Callable[[], torch.nn.Module], dtype: torch.dtype) -> Run:
    def call(model: torch.nn.Module, prompt: Tensor) -> Tensor:
        out = model(input_ids=prompt, decoder_input_ids=prompt.flip(1), use_cache=False)
        return out.logits[:, -1].log_softmax(-1)

    return captured(call, lively(build, dtype), ids())


def on_text(build: Callable[[], torch.nn.Module], dtype: torch.dtype) -> Run:
    return captured(lambda model, text: model(text).pooler_output, lively(build, dtype), ids())


def on_images(build: Callable[[], torch.nn.Module], dtype: torch.dtype) -> Run:
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1)).to(dtype)

    def call(model: torch.nn.Module, pixels: Tensor) -> Tensor:
        out = model(pixels)
        return out if isinstance(out, Tensor) else out.logits

    return captured(call, lively(build, dtype), pixels)


def on_both(build: Callable[[], torch.nn.Module], dtype: torch.dtype) -> Run:
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1)).to(dtype)

    def call(model: torch.nn.Module, text: Tensor, pixels: Tensor) -> Tensor:
        return model(input_ids=text, pixel_values=pixels).logits_per_image

    return captured(call, lively(build, dtype), ids(), pixels)


def step(build: Callable[[], torch.nn.Module], dtype: torch.dtype) -> Run:
    return decoded(lively(build, dtype), ids(1))


@dataclass(frozen=True)
class Case:
    run: Callable[[Callable[[], torch.nn.Module], torch.dtype], Run]
    build: Callable[[], torch.nn.Module]
    kernels: tuple[int, int]  # before and after, in float32
    fused: dict[str, int] = field(default_factory=dict)


#: The residual that the last position is sliced from has gaps, so that nothing is added to it in place.
CASES = {
    "gpt2": Case(prefill, models.gpt2, (46, 31), {"gelu": LAYERS, "last_position": 1}),
    "llama": Case(
        prefill,
        models.llama,
        (90, 49),
        {
            "norms": 2 * LAYERS + 1,
            "rotary": 2 * LAYERS,
            "last_position": 1,
            "residuals": 2 * LAYERS - 1,
        },
    ),
    "t5": Case(
        encoder_decoder,
        models.t5,
        (186, 103),
        {"norms": 5 * LAYERS + 2, "last_position": 1, "residuals": 5 * LAYERS - 1},
    ),
    "bert": Case(on_text, models.bert, (33, 33), {"last_position": 1}),
    "clip": Case(on_both, models.clip, (83, 83), {"last_position": 1}),
    "resnet": Case(on_images, models.resnet18, (68, 68)),
    "vit": Case(on_images, vit, (29, 29), {"last_position": 1}),
    "gpt2 step": Case(step, models.gpt2, (76, 53), {"gelu": LAYERS}),
    "llama step": Case(
        step,
        models.llama,
        (120, 70),
        {"norms": 2 * LAYERS + 1, "rotary": 2 * LAYERS, "residuals": 2 * LAYERS},
    ),
    "t5 step": Case(step, models.t5, (130, 76), {"norms": 3 * LAYERS + 1, "residuals": 3 * LAYERS}),
}
FUSING = {"gelu", "norms", "rotary", "last_position", "residuals"}


@pytest.mark.parametrize("name", CASES)
def test_a_model_keeps_its_values(name: str) -> None:
    case = CASES[name]
    run = case.run(case.build, torch.float32)
    graph, values = run.specialized()
    before = facts.kernels(graph)
    found = rewritten(graph)
    assert_kept(graph, run, values, rtol=1e-4, atol=1e-5)
    assert {k: n for k, n in found.items() if k in FUSING} == case.fused
    # How much is around the layers depends on the version of transformers.
    assert case.kernels[0] - case.kernels[1] - 8 <= before - facts.kernels(graph)


@pytest.mark.parametrize("name", CASES)
def test_a_model_in_bfloat16_comes_no_further_from_the_truth(name: str) -> None:
    case = CASES[name]
    run = case.run(case.build, torch.bfloat16)
    graph, values = run.specialized()
    found = rewritten(graph)
    assert {k: n for k, n in found.items() if k in FUSING} == case.fused
    floats = [v[v.isfinite()] for v in values if v is not None and v.is_floating_point()]
    assert_kept(graph, run, values, rtol=0, atol=0.03 * max(float(v.abs().max()) for v in floats))
    if case.run is step:
        return  # a token chosen otherwise in float32 would make it another step
    exact = case.run(case.build, torch.float32).specialized()[1]
    for value, chain, truth in zip(execute(graph, run.ext), values, exact, strict=True):
        assert error(value, truth) <= 1.2 * error(chain, truth)


def error(value: Tensor | None, truth: Tensor | None) -> float:
    assert value is not None and truth is not None
    return float((value.double() - truth.double()).abs().mean())


def layers_cost(build: Callable[[int], torch.nn.Module]) -> tuple[int, int]:
    """Kernels of one layer of the decode step, before and after."""
    counts = []
    for layers in (1, 2):
        graph, _ = step(lambda layers=layers: build(layers), torch.bfloat16).specialized()
        before = facts.kernels(graph)
        rewritten(graph)
        counts.append((before, facts.kernels(graph)))
    return counts[1][0] - counts[0][0], counts[1][1] - counts[0][1]


def test_the_kernels_of_a_layer_of_decode() -> None:
    """Of GPT-2: two norms, four products, two additions to the cache, attention, GELU, two sums."""
    assert layers_cost(models.gpt2) == (19, 12)
    assert layers_cost(models.llama) == (40, 18)


def test_a_rewrite_that_breaks_the_promise_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def transposing(graph: fx.Graph) -> int:
        output = graph.output_node()
        (value,) = output.args[0]
        output.args = ([facts.insert(output, torch.ops.aten.t.default, (value,), view=True)],)
        return 1

    def aliasing(graph: fx.Graph) -> int:
        output = graph.output_node()
        output.args = ([next(iter(graph.nodes))],)
        return 1

    for broken in (transposing, aliasing):
        graph, _ = captured(lambda t: t.neg(), torch.rand(3, 4)).specialized()
        monkeypatch.setitem(PASSES, "broken", broken)
        with pytest.raises(NotSpecializableError, match="changed the layout"):
            rewritten(graph)
