"""The five workloads: a model, seeded requests, and a plain PyTorch program for one request."""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import cast

# First: without it, neither torchvision nor transformers can be imported beside a CPU-only torch.
import genie.torchvision_compat  # noqa: F401  # isort: skip

from genie.errors import ConfigError
from genie.workloads.microbenchmark import OpCase
from genie.workloads.profiles import PROFILES, Profile, get_profile, resized
from genie.workloads.protocol import ModelInfo, Request, Response, Verification, Workload
from genie.workloads.weights import resolve

#: each in the module of its name, imported when made: transformers takes seconds to import
_CLASSES = {
    "llm_decode": "LlmDecode",
    "llm_prefill": "LlmPrefill",
    "vision_cnn": "VisionCnn",
    "multimodal_vqa": "MultimodalVqa",
    "microbenchmark": "Microbenchmark",
}

#: names, in the order of every table
WORKLOADS: tuple[str, ...] = tuple(_CLASSES)

__all__ = [
    "PROFILES",
    "WORKLOADS",
    "ModelInfo",
    "OpCase",
    "Profile",
    "Request",
    "Response",
    "Verification",
    "Workload",
    "make_workload",
]


def make_workload(
    name: str, profile: str, weights: str | os.PathLike[str] = "seeded", **params: object
) -> Workload:
    """The workload ``name`` at the sizes of ``profile``; ``params`` replace single sizes, e.g. batch=4.

    ``weights`` is "seeded", "pretrained" (the profile's published checkpoint), a directory, or the
    name of a checkpoint on the hub. Raises ConfigError, naming what is valid.
    """
    if name not in _CLASSES:
        raise ConfigError(f"unknown workload {name!r}: choose one of {', '.join(WORKLOADS)}")
    size = resized(getattr(get_profile(profile), name), name, params)
    source = os.fspath(weights)
    if name == "microbenchmark" and source != "seeded":
        raise ConfigError("microbenchmark: single ops have no checkpoint; leave its weights at 'seeded'")
    if source not in ("seeded", "pretrained") and Path(source).expanduser().is_dir():
        source = str(Path(source).expanduser().resolve())  # workers may start in another directory
    workload_class = getattr(importlib.import_module(f"{__name__}.{name}"), _CLASSES[name])
    if name != "microbenchmark":
        # A missing directory is found here, in the process that has the user's ear.
        resolve(source, name, getattr(getattr(size, "model", None), "hub", "torchvision"))
    return cast(Workload, workload_class(profile, size, source))
