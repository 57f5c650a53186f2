"""Real architectures at tiny sizes, each with a call, and what is right to say of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from genie.srg.graph import Modality, Phase
from tests.frontend import models

GREEDY = {"do_sample": False, "pad_token_id": 0, "max_new_tokens": 4, "min_new_tokens": 4}


@dataclass(frozen=True)
class Architecture:
    """``phases`` and ``modalities`` are those of the arithmetic in all of a call's graphs together."""

    name: str
    build: Callable[[], nn.Module]
    call: Callable[[nn.Module], torch.Tensor]
    phases: set[Phase]
    modalities: set[Modality]
    modules: set[str]
    stages: int = 0
    branches: int = 0


def _ids(*shape: int) -> torch.Tensor:
    return torch.arange(3, 3 + shape[0] * shape[1]).view(shape).to("genie")


def _padded(batch: int, length: int) -> dict[str, torch.Tensor]:
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[0, :2] = 0
    return {"input_ids": _ids(batch, length), "attention_mask": mask.to("genie")}


def _image(batch: int) -> torch.Tensor:
    return torch.ones(batch, 3, 32, 32).to("genie")


def _generate(model: nn.Module) -> torch.Tensor:
    return model.generate(_ids(1, 6), attention_mask=torch.ones(1, 6).long().to("genie"), **GREEDY)


def vit() -> nn.Module:
    from transformers import ViTConfig, ViTModel

    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128, image_size=32,
        patch_size=8,
    )  # fmt: skip
    return ViTModel(config).eval()


def convnext() -> nn.Module:
    from transformers import ConvNextConfig, ConvNextModel

    torch.manual_seed(0)
    config = ConvNextConfig(hidden_sizes=[8, 16, 32, 64], depths=[1, 1, 2, 1], image_size=32)
    return ConvNextModel(config).eval()


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Sequential(nn.Linear(16, 16), nn.GELU()) for _ in range(9))).eval()


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(8, 8, num_layers=2, batch_first=True)
        self.head = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.lstm(x)[0][:, -1])


class MessagePassing(nn.Module):
    """Two rounds of a graph network: each node adds up what its neighbours send."""

    def __init__(self) -> None:
        super().__init__()
        self.kinds = nn.Embedding(7, 8)
        self.rounds = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))

    def forward(self, kinds: torch.Tensor, source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        x = self.kinds(kinds)
        for send in self.rounds:
            x = torch.zeros_like(x).index_add_(0, target, torch.relu(send(x))[source]) + x
        return x


def _edges(model: nn.Module) -> torch.Tensor:
    kinds, source = torch.tensor([0, 3, 3, 6, 2]), torch.tensor([0, 1, 2, 3])
    return model(kinds.to("genie"), source.to("genie"), (source + 1).to("genie"))


TEXT, VISION, BOTH, NONE = Modality.TEXT, Modality.VISION, Modality.MULTIMODAL, Modality.UNKNOWN
ARCHITECTURES = [
    Architecture(
        "gpt2", models.gpt2, _generate, {Phase.PREFILL, Phase.DECODE}, {TEXT},
        {"transformer.wte", "transformer.wpe", "transformer.h.1.attn.c_attn", "transformer.h.0.mlp",
         "lm_head"},
    ),
    Architecture(
        "gpt2-padded-without-cache", models.gpt2,
        lambda m: m(**_padded(2, 7), use_cache=False).logits,
        {Phase.PREFILL}, {TEXT}, {"transformer.h.0.attn", "lm_head"},
    ),
    Architecture(
        "llama", models.llama, _generate, {Phase.PREFILL, Phase.DECODE}, {TEXT},
        {"model.embed_tokens", "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn", "lm_head"},
    ),
    Architecture(
        "t5", models.t5, lambda m: m.generate(_ids(1, 7), **GREEDY),
        {Phase.TEXT_ENCODE, Phase.PREFILL, Phase.DECODE}, {TEXT},
        {"encoder.embed_tokens", "encoder.block.1.layer.0.SelfAttention.q", "decoder.embed_tokens",
         "decoder.block.0.layer.1.EncDecAttention.k", "lm_head"},
    ),
    Architecture(
        "t5-without-cache", models.t5,
        lambda m: m(input_ids=_ids(1, 7), decoder_input_ids=_ids(1, 5), use_cache=False).logits,
        {Phase.TEXT_ENCODE, Phase.PREFILL}, {TEXT}, {"encoder.final_layer_norm", "lm_head"},
    ),
    Architecture(
        "bert", models.bert, lambda m: m(**_padded(2, 9)).last_hidden_state, {Phase.TEXT_ENCODE}, {TEXT},
        {"embeddings.word_embeddings", "encoder.layer.1.attention.self.query",
         "encoder.layer.0.intermediate.dense"},
    ),
    Architecture(
        "vit", vit, lambda m: m(_image(2)).last_hidden_state, {Phase.VISION_ENCODE}, {VISION}, {"layernorm"},
    ),
    Architecture(
        "resnet", models.resnet18, lambda m: m(_image(2)), {Phase.VISION_ENCODE}, {VISION},
        {"conv1", "layer1.0.conv1", "layer1.0", "layer2.0.downsample.0", "fc"}, stages=5,
    ),
    Architecture(
        "convnext", convnext, lambda m: m(_image(2)).last_hidden_state, {Phase.VISION_ENCODE}, {VISION},
        {"embeddings.patch_embeddings"}, stages=4,
    ),
    Architecture(
        "clip", models.clip, lambda m: m(pixel_values=_image(2), input_ids=_ids(3, 10)).logits_per_image,
        {Phase.TEXT_ENCODE, Phase.VISION_ENCODE, Phase.UNKNOWN}, {TEXT, VISION, BOTH},
        {"text_projection", "visual_projection"}, branches=2,
    ),
    Architecture(
        "mlp", mlp, lambda m: m(torch.ones(2, 16).to("genie")), {Phase.UNKNOWN}, {NONE}, {"0.0", "8.0"}
    ),
    Architecture(
        "lstm", lambda: Recurrent().eval(), lambda m: m(torch.ones(2, 5, 8).to("genie")),
        {Phase.UNKNOWN}, {NONE}, {"head"},
    ),
    Architecture(
        "message passing", lambda: MessagePassing().eval(), _edges, {Phase.UNKNOWN}, {NONE},
        {"kinds", "rounds.0"},
    ),
]  # fmt: skip
