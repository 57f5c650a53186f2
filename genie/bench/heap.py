"""The heap at the start of a cell's rounds: collected, and frozen out of the garbage collector.

torch and transformers make a million objects, and one full collection of them costs more than most
cells' requests. So the heap stays frozen from cell to cell, and a cell's start collects what came since.
Garbage that was frozen before it became garbage waits; it is let go of before it could matter.
"""

from __future__ import annotations

import gc

import psutil
import torch

#: growth of this process's memory since the last full collection that calls for the next one
GROWTH_BYTES = 256 * 2**20

_resident_bytes: int | None = None


def settle() -> None:
    """Collects what can be garbage, then freezes all that is left until the next call."""
    global _resident_bytes
    resident = psutil.Process().memory_info().rss
    # Memory of a GPU does not show in this process's: there every cell starts from a full collection.
    if _resident_bytes is None or resident > _resident_bytes + GROWTH_BYTES or torch.cuda.is_initialized():
        gc.unfreeze()
        gc.collect()
        _resident_bytes = psutil.Process().memory_info().rss
    else:
        gc.collect()
    gc.freeze()
