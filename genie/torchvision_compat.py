"""Makes ``import torchvision`` work where its C++ extension does not load. Import this module first.

The registry's ``torchvision`` wheel is built for CUDA. Beside a CPU-only torch its extension cannot be
opened, and torchvision's own import then dies while it registers shape functions for operators that
nobody declared (``operator torchvision::nms does not exist``), which breaks ``transformers`` too. Only
``nms`` and ``qnms`` are needed at import time (true of torchvision 0.26 to 0.28); no model of ours
calls either, and calling one still fails, with PyTorch's "no kernel" error.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)

#: keeps the declarations alive: PyTorch drops them with the Library object
_library: torch.library.Library | None = None


def extension_loaded() -> bool:
    """True where torchvision's real operators are registered, loading its extension if that is possible.

    Looks the file up without importing the package, because that import is what fails.
    """
    if hasattr(torch.ops.torchvision, "nms") and _library is None:
        return True
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        return False
    for extension in sorted(Path(spec.origin).parent.glob("_C*.so")):
        try:
            torch.ops.load_library(str(extension))
        except (ImportError, OSError):
            continue  # built for another torch: the case that this module exists for
        return True
    return False


def declare_missing_operators() -> bool:
    """Declares the two schemas unless the real ones exist; returns whether ours are in place."""
    global _library
    if _library is None and not extension_loaded():
        library = torch.library.Library("torchvision", "DEF")
        for schema in _SCHEMAS:
            library.define(schema)
        _library = library
    return _library is not None


declare_missing_operators()
