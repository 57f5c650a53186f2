"""The least time that a request can take on one device: what it must compute and read, at its limits.

A request is a sequence of steps of which each needs the one before. Of each step are known, from the model's
published sizes, the floating-point operations (a multiply-add is 2) and the bytes of device memory that must
be read at least: every weight once, and the KV cache of a decode step. Activations, copies from and to the
host, launches and everything on the client are left out, so no program can be faster than

    sum over the steps of max(operations / rate, bytes / bandwidth)

Attention with a causal mask counts half of the matrix. Embeddings are gathered: only the rows needed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from genie.errors import ConfigError

if TYPE_CHECKING:
    from genie.workloads.profiles import DecodeSize, Gpt2Shape, PrefillSize, VisionSize, VqaSize

ITEMSIZE = {"float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True)
class Step:
    """``flops``: floating-point operations; ``nbytes``: of device memory."""

    flops: float
    nbytes: float


@dataclass(frozen=True)
class Limits:
    """Of one device: FLOP/s and bytes/s that it reaches, and who says so."""

    rate: float
    bandwidth: float
    source: str


@dataclass(frozen=True)
class Floor:
    """``bound``: "compute" or "memory", whichever the larger part of the seconds is due to."""

    seconds: float
    bound: str


def floor_of(steps: tuple[Step, ...], limits: Limits) -> Floor:
    compute = memory = 0.0
    for step in steps:
        by_rate, by_bandwidth = step.flops / limits.rate, step.nbytes / limits.bandwidth
        if by_rate > by_bandwidth:
            compute += by_rate
        else:
            memory += by_bandwidth
    return Floor(compute + memory, "compute" if compute > memory else "memory")


def steps_of(info: Mapping[str, Any]) -> tuple[Step, ...] | None:
    """Of a stored cell's request (its ``extra_info``), the first one of a decode being the prefill. None for
    a workload or a model that is not one of the suite's own."""
    from genie.workloads import PROFILES, WORKLOADS, resized

    profile, workload = PROFILES.get(info["profile"]), info["workload"]
    itemsize = ITEMSIZE.get(info["model"]["dtype"])
    if profile is None or itemsize is None or workload not in WORKLOADS:
        return None
    try:
        size = resized(getattr(profile, workload), workload, dict(info.get("params") or {}))
    except ConfigError:
        return None
    if workload == "microbenchmark":
        return _microbenchmark(info["profile"])
    if getattr(size.model, "name", size.model) != info["model"]["name"]:
        return None
    made: dict[str, Callable[[Any, int], tuple[Step, ...]]] = {
        "llm_decode": decode,
        "llm_prefill": prefill,
        "vision_cnn": vision,
        "multimodal_vqa": vqa,
    }
    return made[workload](size, itemsize) if workload in made else None


def decode(size: DecodeSize, itemsize: int) -> tuple[Step, ...]:
    """The prefill, which gives the first token, and a step for each of the others."""
    shape, batch = size.model, size.batch
    per_step = 2 * batch * (_block_weights(shape) + _head_weights(shape))
    per_position = 2 * shape.layers * shape.width  # keys and values
    weights = _block_weights(shape) + _head_weights(shape) + _small_weights(shape)
    steps = [_prefill(shape, batch, size.prompt, itemsize)]
    for made in range(1, size.new_tokens):
        context = size.prompt + made
        attention = 4 * shape.layers * shape.width * context * batch
        steps.append(Step(per_step + attention, itemsize * (weights + per_position * context * batch)))
    return tuple(steps)


def prefill(size: PrefillSize, itemsize: int) -> tuple[Step, ...]:
    return (_prefill(size.model, size.batch, size.prompt, itemsize),)


def _prefill(shape: Gpt2Shape, batch: int, prompt: int, itemsize: int) -> Step:
    """Logits of the last position alone."""
    attention = 2 * shape.layers * shape.width * prompt * (prompt + 1)
    flops = batch * (2 * prompt * _block_weights(shape) + attention + 2 * _head_weights(shape))
    return Step(flops, itemsize * (_block_weights(shape) + _head_weights(shape) + _small_weights(shape)))


def _block_weights(shape: Gpt2Shape) -> int:
    """Of the matrices of all layers: attention 4 w^2, MLP 8 w^2."""
    return 12 * shape.layers * shape.width**2


def _head_weights(shape: Gpt2Shape) -> int:
    """Tied to the embedding of tokens."""
    return int(shape.vocab * shape.width)


def _small_weights(shape: Gpt2Shape) -> int:
    """Biases and layer norms: 13 w a layer, 2 w at the end."""
    return (13 * shape.layers + 2) * shape.width


def vqa(size: VqaSize, itemsize: int) -> tuple[Step, ...]:
    """Both towers as one step: they may run side by side."""
    shape = size.model
    width, layers, _, mlp = shape.image_tower
    patches = (shape.image_px // shape.patch_px) ** 2
    patch_weights = 3 * shape.patch_px**2 * width
    image = layers * (4 * width**2 + 2 * width * mlp)
    flops = size.images * (
        2 * (patches + 1) * image
        + 2 * patches * patch_weights
        + 4 * layers * width * (patches + 1) ** 2
        + 2 * width * shape.projection
    )
    weights = image + patch_weights + width * shape.projection
    width, layers, _, mlp = shape.text_tower
    text = layers * (4 * width**2 + 2 * width * mlp)
    tokens = size.text_tokens
    flops += size.candidates * (
        2 * tokens * text + 2 * layers * width * tokens * (tokens + 1) + 2 * width * shape.projection
    )
    weights += text + width * shape.projection
    flops += 2 * size.images * size.candidates * shape.projection
    return (Step(flops, itemsize * weights),)


def vision(size: VisionSize, itemsize: int) -> tuple[Step, ...]:
    """Micro-batches wait for nobody, but a device that runs them one by one reads the weights each time: so
    they count as one step with one reading, which no order of execution can undercut."""
    per_image, weights = _resnet(size.model, size.px)
    return (Step(size.micro_batches * size.micro_batch * per_image, itemsize * weights),)


@cache
def _resnet(name: str, px: int) -> tuple[int, int]:
    """FLOPs for one image, as PyTorch's own counter has them, and the number of weights."""
    import genie.torchvision_compat  # noqa: F401  (before torchvision)  # isort: skip
    import torch
    from torch.utils.flop_counter import FlopCounterMode
    from torchvision.models import get_model

    with torch.device("meta"), torch.no_grad():
        model = get_model(name).eval()
        with FlopCounterMode(display=False) as counter:
            model(torch.empty(1, 3, px, px))
    return counter.get_total_flops(), sum(p.numel() for p in model.parameters())


def _microbenchmark(profile: str) -> tuple[Step, ...]:
    """A round: each op by itself."""
    from genie.workloads import make_workload
    from genie.workloads.microbenchmark import Microbenchmark

    made = make_workload("microbenchmark", profile)
    assert isinstance(made, Microbenchmark)
    return tuple(Step(case.flops, case.bytes) for case in made.op_cases)
