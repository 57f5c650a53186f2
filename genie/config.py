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
    "run_ahead",
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
    "compiled",
    "run_ahead",
)

#: ways in which a server may run a program beside op by op, for sessions that ask for it; the feature
#: ``compiled`` is all of them
ENGINES: tuple[str, ...] = ("graph", "compiled")
#: windows that a server may run before its client asks for them; the feature ``run_ahead`` is as many. One
#: is all that can be of use: the server then never waits for a client that is faster, nor a client for it
MAX_RUN_AHEAD = 1

#: features of the scheduler that decides for a pool of several servers
POOL_FEATURES: tuple[str, ...] = ("phases", "pipelining", "branches", "cost_model")

#: a feature that cannot work without another is off when that one is: where each program may run
#: elsewhere, the state of the one before cannot stay in place; and where nothing stays, every program
#: runs alone, so there is nothing to schedule, to keep in place, or to go on from
NEEDS: dict[str, str] = {"residency": "colocation"} | dict.fromkeys(
    (*POOL_FEATURES, "compiled", "run_ahead"), "residency"
)
