"""The semantic features of ``genie_full``: all of them, and those that this version can switch on."""

from __future__ import annotations

#: every named feature; ``genie_no_semantics`` is all of them off
FEATURES: tuple[str, ...] = (
    "residency",
    "colocation",
    "phases",
    "pipelining",
    "branches",
    "cost_model",
    "replay",
    "compiled",
)

#: features that exist today; only these may be listed as enabled in a result
IMPLEMENTED_FEATURES: tuple[str, ...] = (
    "residency",
    "colocation",
    "phases",
    "pipelining",
    "branches",
    "cost_model",
    "replay",
)

#: features of the scheduler that decides for a pool of several servers
POOL_FEATURES: tuple[str, ...] = ("phases", "pipelining", "branches", "cost_model")

#: a feature that cannot work without another is off when that one is: where each program may run
#: elsewhere, the state of the one before cannot stay in place; and where nothing stays, every program
#: runs alone, so there is nothing to schedule
NEEDS: dict[str, str] = {"residency": "colocation"} | dict.fromkeys(POOL_FEATURES, "residency")
