"""Random tensors that are bitwise the same in every process, on every CPU and torch version.

Only ``uniform_`` on [0, 1) is drawn: it maps the generator's bits to floats exactly, whereas ``normal_``
goes through log and cos, whose last bit depends on the CPU's vector unit.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import torch


def generator(*key: object) -> torch.Generator:
    """A CPU generator seeded by ``key``, e.g. ("llm_decode", 3, "")."""
    digest = hashlib.sha256("\x1f".join(map(str, key)).encode()).digest()
    # The Mersenne twister uses 32 bits of its seed; give it the first 32 of the hash.
    return torch.Generator("cpu").manual_seed(int.from_bytes(digest[:4], "little"))


def fill_uniform(tensor: torch.Tensor, std: float, source: torch.Generator) -> None:
    """Overwrites ``tensor`` in place with zero-mean uniform values of standard deviation ``std``."""
    values = torch.empty(tensor.shape, dtype=torch.float32).uniform_(0, 1, generator=source)
    tensor.copy_(values.sub_(0.5).mul_(std * math.sqrt(12.0)))


def uniform(shape: Sequence[int], dtype: torch.dtype, source: torch.Generator) -> torch.Tensor:
    """A CPU tensor of zero-mean, unit-variance values."""
    tensor = torch.empty(tuple(shape), dtype=dtype)
    fill_uniform(tensor, 1.0, source)
    return tensor


def images(shape: Sequence[int], dtype: torch.dtype, source: torch.Generator) -> torch.Tensor:
    """Unit-variance images (..., channels, height, width): 4 x 4 patches of colour plus noise.

    Noise alone would be averaged away by the pooling, and all images would get the same logits.
    """
    coarse = uniform((*shape[:-2], 4, 4), torch.float32, source)
    row, column = (torch.arange(size) * 4 // size for size in shape[-2:])
    patches = coarse[..., row[:, None], column]
    noise = uniform(shape, torch.float32, source)
    return ((patches + noise) * math.sqrt(0.5)).to(dtype)


def token_ids(shape: Sequence[int], below: int, source: torch.Generator) -> torch.Tensor:
    """int64 ids in [0, below)."""
    return torch.randint(0, below, tuple(shape), dtype=torch.int64, generator=source)
