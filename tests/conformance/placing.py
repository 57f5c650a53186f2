"""A sample's arguments, made anew on a device with the geometry that they have on the CPU."""

from __future__ import annotations

from typing import Any

import torch

DOUBLE = "cpu, in double precision"


def place(value: Any, device: str) -> Any:
    """``value`` with every tensor copied to ``device`` and every mention of the CPU replaced.

    Strides and offset stay, so views and expanded tensors arrive as such; leaves that require
    grad do so again. ``device`` may be `DOUBLE`.
    """
    if isinstance(value, torch.Tensor):
        return _place_tensor(value, device)
    if isinstance(value, dict):
        return {k: place(v, device) for k, v in value.items()}
    if type(value) in (list, tuple):
        return type(value)(place(v, device) for v in value)
    if isinstance(value, torch.device) or (isinstance(value, str) and value == "cpu"):
        device = "cpu" if device == DOUBLE else device
        return torch.device(device) if isinstance(value, torch.device) else device
    if value is torch.float32 and device == DOUBLE:
        return torch.float64
    return value


def _place_tensor(t: torch.Tensor, device: str) -> torch.Tensor:
    plain = t.detach()
    if device == DOUBLE:
        device = "cpu"
        plain = plain.double() if plain.dtype is torch.float32 else plain
    if plain.layout is not torch.strided:
        placed = plain.clone() if device == "cpu" else plain.to(device)
    else:
        plain = plain.resolve_conj().resolve_neg()
        elements = plain.untyped_storage().nbytes() // plain.element_size()
        if elements == plain.numel() and plain.is_contiguous():
            placed = torch.empty(plain.shape, dtype=plain.dtype, device=device).copy_(plain)
        else:
            block = plain.as_strided((elements,), (1,), 0)
            whole = block.clone() if device == "cpu" else block.to(device)
            placed = whole.as_strided(plain.shape, plain.stride(), plain.storage_offset()).detach()
    if isinstance(t, torch.nn.Parameter):
        return torch.nn.Parameter(placed, t.requires_grad)
    return placed.requires_grad_(t.requires_grad)
