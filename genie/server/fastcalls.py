"""Shorter ways to call the hottest ops: the same kernels without the generic argument parser."""

from __future__ import annotations

from typing import Any

import torch


def fast_call(name: str, overload: torch._ops.OpOverload) -> Any:
    """The callable for ``name``; falls back on the overload's own binding, never on another op."""
    return _FAST.get(name, overload._op)


_FAST: dict[str, Any] = {}
