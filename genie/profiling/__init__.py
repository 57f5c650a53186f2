"""A trace of what happens where: `profile` writes it, `span` adds a part of one's own to it."""

from __future__ import annotations

from genie.profiling.profile import profile
from genie.profiling.spans import span

__all__ = ["profile", "span"]
