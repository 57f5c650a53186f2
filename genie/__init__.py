"""Genie: a remote-accelerator runtime for PyTorch that understands the graph it runs.

``import genie`` is light. Device ``genie`` is registered by `genie.enable`, which `genie.local` and
`genie.connect` call; call it before the first ``backward()`` of the process if that comes earlier,
because PyTorch's autograd engine sizes its device queues once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from genie.frontend.device import register as enable
    from genie.frontend.session import Session
    from genie.profiling.profile import profile
    from genie.runtime.in_process import local
    from genie.runtime.remote import connect
    from genie.semantics.annotation import annotate_phase

__all__ = ["Session", "annotate_phase", "connect", "enable", "local", "profile"]
__version__ = "0.1.0"

_LAZY = {
    "Session": ("genie.frontend.session", "Session"),
    "annotate_phase": ("genie.semantics.annotation", "annotate_phase"),
    "connect": ("genie.runtime.remote", "connect"),
    "enable": ("genie.frontend.device", "register"),
    "local": ("genie.runtime.in_process", "local"),
    "profile": ("genie.profiling.profile", "profile"),
}


def __getattr__(name: str) -> Any:
    # Loaded on first use: a server, the command line and the pytest plugin must start quickly.
    if name in _LAZY:
        import importlib

        module, attribute = _LAZY[name]
        return getattr(importlib.import_module(module), attribute)
    raise AttributeError(f"module 'genie' has no attribute {name!r}")
