"""Rewrites of a specialised program, each safe for the program it is given. See `rewritten`.

A pass is a function from a graph to the number of places it changed. It leaves the kept values equal: bit
by bit where it only removes or shares work, within the rounding of one op where it fuses a chain into the op
that the chain spells out.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import fx

from genie.server.engines.rewrite.copies import copies
from genie.server.engines.rewrite.dead import dead
from genie.server.engines.rewrite.duplicates import duplicates
from genie.server.engines.rewrite.facts import kept, same_geometry, spec
from genie.server.engines.rewrite.gelu import gelu
from genie.server.engines.rewrite.last_position import last_position
from genie.server.engines.rewrite.norms import norms
from genie.server.engines.rewrite.residuals import residuals
from genie.server.engines.rewrite.rotary import rotary
from genie.server.engines.specialize import NotSpecializableError, Spec

Pass = Callable[[fx.Graph], int]
#: in the order in which they run: what removes work first, so that chains have no copies in them; what
#: writes in place last, since no pass touches memory that is written to
PASSES: dict[str, Pass] = {
    "dead": dead,
    "copies": copies,
    "duplicates": duplicates,
    "gelu": gelu,
    "norms": norms,
    "rotary": rotary,
    "last_position": last_position,
    "residuals": residuals,
}


def load() -> None:
    """Imports what passes need when they ask a meta kernel what an op makes: seconds, once in a process."""
    torch.add(torch.empty(1, device="meta"), 1)


def rewritten(graph: fx.Graph) -> dict[str, int]:
    """Applies all passes in place; returns the places that each changed, without those that changed none.

    Raises NotSpecializableError where a kept value would come out with another geometry, or sharing memory
    with other values than before; the graph is of no use then.
    """
    specs, sharing = _promise(graph)
    found = {name: apply(graph) for name, apply in PASSES.items()}
    dead(graph)  # what only the replaced calls read
    graph.lint()
    after, sharing_after = _promise(graph)
    if sharing != sharing_after or not all(map(same_geometry, specs, after)):
        raise NotSpecializableError(
            f"a rewrite changed the layout of what the program keeps (applied: {found}): please report it"
        )
    return {name: n for name, n in found.items() if n}


def _promise(graph: fx.Graph) -> tuple[list[Spec | None], list[int]]:
    """The kept values' specs, and for each external and kept value the first that it shares memory with."""
    values = [n for n in graph.nodes if n.op == "placeholder"] + kept(graph)
    specs = [None if n is None else spec(n) for n in values]
    first: dict[int, int] = {}
    sharing = [first.setdefault(s.storage, k) if s is not None else -1 for k, s in enumerate(specs)]
    return specs, sharing
