"""What Genie keeps on disk between runs: ``$GENIE_CACHE_DIR``, else ``$XDG_CACHE_HOME/genie``, else
``~/.cache/genie``, with a folder for each kind of thing."""

from __future__ import annotations

import os
from pathlib import Path


def directory(kind: str) -> Path:
    """It need not exist yet."""
    own = os.environ.get("GENIE_CACHE_DIR")
    if own:
        return Path(own).expanduser() / kind
    base = os.environ.get("XDG_CACHE_HOME")
    # The specification of XDG says to ignore a relative one.
    home = Path(base) if base and Path(base).is_absolute() else Path.home() / ".cache"
    return home / "genie" / kind
