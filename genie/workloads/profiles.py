"""The sizes of every workload in every profile: one table, nothing computed."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import TypeVar

import torch

from genie.errors import ConfigError


@dataclass(frozen=True)
class Gpt2Shape:
    """A GPT-2 decoder; ``hub`` names the published checkpoint of exactly this shape, "" if none."""

    name: str
    width: int
    layers: int
    heads: int
    vocab: int = 50257
    positions: int = 1024
    hub: str = ""


@dataclass(frozen=True)
class ClipShape:
    """A CLIP model. Towers are (width, layers, heads, mlp); ``hub`` as in Gpt2Shape."""

    name: str
    image_tower: tuple[int, int, int, int]
    text_tower: tuple[int, int, int, int]
    image_px: int
    patch_px: int
    projection: int
    vocab: int = 49408
    positions: int = 77
    hub: str = ""


@dataclass(frozen=True)
class DecodeSize:
    """Greedy decoding: ``batch`` prompts of ``prompt`` tokens, ``new_tokens`` generated for each."""

    model: Gpt2Shape
    prompt: int
    new_tokens: int
    batch: int = 1


@dataclass(frozen=True)
class PrefillSize:
    """``batch`` prompts of ``prompt`` tokens in one forward pass."""

    model: Gpt2Shape
    batch: int
    prompt: int


@dataclass(frozen=True)
class VisionSize:
    """A stream of ``micro_batches`` batches of ``micro_batch`` RGB images of ``px`` x ``px``."""

    model: str
    px: int
    micro_batches: int
    micro_batch: int
    channels_last: bool = False


@dataclass(frozen=True)
class VqaSize:
    """``images`` images against ``candidates`` texts (question + answer) of ``text_tokens`` tokens."""

    model: ClipShape
    images: int
    candidates: int
    text_tokens: int


@dataclass(frozen=True)
class MicroSize:
    """For each op its sizes from small to large; what a size means is stated in microbenchmark.py."""

    sizes: tuple[tuple[str, tuple[int, ...]], ...]


@dataclass(frozen=True)
class Profile:
    name: str
    dtype: torch.dtype
    llm_decode: DecodeSize
    llm_prefill: PrefillSize
    vision_cnn: VisionSize
    multimodal_vqa: VqaSize
    microbenchmark: MicroSize


GPT2_SMOKE = Gpt2Shape("gpt2-2l-256", width=256, layers=2, heads=4, vocab=8192, positions=256)
GPT2_124M = Gpt2Shape("gpt2", width=768, layers=12, heads=12, hub="openai-community/gpt2")
GPT2_XL = Gpt2Shape("gpt2-xl", width=1600, layers=48, heads=25, hub="openai-community/gpt2-xl")

CLIP_SMOKE = ClipShape(
    "clip-2l-128", (128, 2, 2, 512), (128, 2, 2, 512), image_px=64, patch_px=16, projection=64, vocab=1024
)
CLIP_VIT_B32 = ClipShape(
    "clip-vit-base-patch32",
    (768, 12, 12, 3072),
    (512, 12, 8, 2048),
    image_px=224,
    patch_px=32,
    projection=512,
    hub="openai/clip-vit-base-patch32",
)
CLIP_VIT_L14 = ClipShape(
    "clip-vit-large-patch14",
    (1024, 24, 16, 4096),
    (768, 12, 12, 3072),
    image_px=224,
    patch_px=14,
    projection=768,
    hub="openai/clip-vit-large-patch14",
)

PROFILES: dict[str, Profile] = {
    "smoke": Profile(
        name="smoke",
        dtype=torch.float32,
        llm_decode=DecodeSize(GPT2_SMOKE, prompt=16, new_tokens=8),
        llm_prefill=PrefillSize(GPT2_SMOKE, batch=4, prompt=64),
        vision_cnn=VisionSize("resnet18", px=32, micro_batches=8, micro_batch=2),
        multimodal_vqa=VqaSize(CLIP_SMOKE, images=2, candidates=4, text_tokens=16),
        microbenchmark=MicroSize(
            (
                ("matmul", (64, 128)),
                ("linear", (32, 64)),
                ("conv2d", (8, 16)),
                ("attention", (16, 32)),
                ("norm", (8, 32)),
                ("softmax", (32, 64)),
                ("elementwise", (8, 32)),
                ("embedding", (8, 64)),
                ("reduction", (32, 64)),
                ("cat", (8, 32)),
            )
        ),
    ),
    "cpu": Profile(
        name="cpu",
        dtype=torch.float32,
        llm_decode=DecodeSize(GPT2_124M, prompt=128, new_tokens=16),
        llm_prefill=PrefillSize(GPT2_124M, batch=4, prompt=128),
        vision_cnn=VisionSize("resnet50", px=224, micro_batches=8, micro_batch=1),
        multimodal_vqa=VqaSize(CLIP_VIT_B32, images=4, candidates=12, text_tokens=32),
        microbenchmark=MicroSize(
            (
                ("matmul", (128, 512, 1024)),
                ("linear", (64, 256, 512)),
                ("conv2d", (14, 28, 56)),
                ("attention", (64, 256, 512)),
                ("norm", (64, 512, 2048)),
                ("softmax", (128, 512, 1024)),
                ("elementwise", (64, 512, 2048)),
                ("embedding", (64, 512, 4096)),
                ("reduction", (128, 512, 1024)),
                ("cat", (64, 512, 2048)),
            )
        ),
    ),
    "gpu": Profile(
        name="gpu",
        dtype=torch.float16,
        llm_decode=DecodeSize(GPT2_XL, prompt=72, new_tokens=128),
        llm_prefill=PrefillSize(GPT2_XL, batch=8, prompt=512),
        vision_cnn=VisionSize("resnet152", px=224, micro_batches=16, micro_batch=32, channels_last=True),
        multimodal_vqa=VqaSize(CLIP_VIT_L14, images=8, candidates=16, text_tokens=77),
        microbenchmark=MicroSize(
            (
                ("matmul", (512, 1024, 2048, 4096)),
                ("linear", (256, 512, 1024, 2048)),
                ("conv2d", (28, 56, 112, 224)),
                ("attention", (256, 512, 1024, 2048)),
                ("norm", (256, 1024, 4096, 16384)),
                ("softmax", (512, 1024, 2048, 4096)),
                ("elementwise", (256, 1024, 4096, 16384)),
                ("embedding", (512, 2048, 8192, 32768)),
                ("reduction", (512, 1024, 2048, 4096)),
                ("cat", (256, 1024, 4096, 16384)),
            )
        ),
    ),
}

Size = TypeVar("Size", DecodeSize, PrefillSize, VisionSize, VqaSize, MicroSize)


def get_profile(name: str) -> Profile:
    if name not in PROFILES:
        raise ConfigError(f"unknown profile {name!r}: choose one of {', '.join(PROFILES)}")
    return PROFILES[name]


def resized(size: Size, workload: str, params: dict[str, object]) -> Size:
    """``size`` with the integer fields in ``params`` replaced; ConfigError for anything else."""
    valid = [f.name for f in fields(size) if f.type in ("int", int)]
    for name, value in params.items():
        if name not in valid:
            raise ConfigError(
                f"workload {workload!r} has no parameter {name!r}: "
                + (f"choose from {', '.join(valid)}" if valid else "it takes none")
            )
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConfigError(f"parameter {name}={value!r} of {workload!r} must be a positive integer")
    return replace(size, **params)  # type: ignore[arg-type]


def changed(size: Size, default: Size) -> dict[str, object]:
    """The fields in which ``size`` differs from the profile's ``default``."""
    names = (f.name for f in fields(size))
    return {name: getattr(size, name) for name in names if getattr(size, name) != getattr(default, name)}
