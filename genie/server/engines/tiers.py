"""When a captured program is compiled, and whether that stays: `Tiers`, for each capacity of its caches.

eager < graph < compiled graph. The compiler works in the background. What it made is compared with the
program, runs from the next generation on, and is given up if it is slower than the graph that it replaces.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import Tensor, fx

from genie.server.engines.agree import disagreement
from genie.server.engines.emit import Run
from genie.server.engines.inductor import WORTH_RUNS, Asked, Compiler

log = logging.getLogger("genie.server")

#: compiled runs after which their best is compared with the best before
TRIALS = 10
SLOWER = 1.0


@dataclass
class _Tier:
    runs: int = 0
    asked: Asked | None = None
    given_up: bool = False
    verified: bool = False
    best_s: dict[bool, float] = field(default_factory=dict)  # compiled or not
    trials: int = 0


def _is_ready(tier: _Tier) -> bool:
    return tier.asked is not None and tier.asked.run is not None and not tier.given_up


class Tiers:
    """Of one captured program. ``compiler`` None: it stays as it is."""

    def __init__(self, compiler: Compiler | None) -> None:
        self._compiler = compiler
        self._tiers: dict[int, _Tier] = {}
        #: of the run before, and whether it was compiled
        self.capacity = 0
        self.compiled = False

    def run(self, capacity: int) -> Run | None:
        """The compiled program, where there is one that is not given up."""
        tier = self._tiers.get(capacity)
        return tier.asked.run if tier is not None and tier.asked is not None and _is_ready(tier) else None

    def ran(
        self, capacity: int, compiled: bool, program: Callable[[], tuple[fx.Graph, Sequence[Tensor]]]
    ) -> None:
        """After a run. ``program``: what to compile, and what its placeholders are bound to."""
        self.capacity, self.compiled = capacity, compiled
        tier = self._tiers.setdefault(capacity, _Tier())
        tier.runs += 1
        if self._compiler is not None and tier.asked is None and tier.runs >= WORTH_RUNS:
            tier.asked = self._compiler.ask(*program())

    @property
    def wants_time(self) -> bool:
        """Whether the next run is one of those that are compared."""
        tier = self._tiers.get(self.capacity)
        return tier is None or tier.runs <= TRIALS or (tier.trials <= TRIALS and _is_ready(tier))

    def took(self, seconds: float) -> bool:
        """The run before. False if compiled code is given up for that."""
        tier = self._tiers[self.capacity]
        best = tier.best_s
        best[self.compiled] = min(seconds, best.get(self.compiled, seconds))
        if self.compiled and not tier.given_up:
            tier.trials += 1
            if tier.trials > TRIALS and False in best and best[True] > SLOWER * best[False]:
                self.give_up(self.capacity, f"{best[True] * 1e3:.3f} ms after {best[False] * 1e3:.3f} ms")
                return False
        return True

    def give_up(self, capacity: int, reason: str) -> None:
        self._tiers[capacity].given_up = True
        log.info("compiled code is given up, the program runs as before: %s", reason)

    def verified(self, capacity: int) -> bool:
        return self._tiers[capacity].verified

    def verify(self, capacity: int, plain: Run, args: Sequence[Tensor], buffers: Sequence[Tensor]) -> str:
        """Compares what is compiled with the plain program; "" where they agree, else how they do not.
        ``args``: the placeholders' values, the position among them 0, with ``buffers``, whose first positions
        are written to."""
        compiled = self.run(capacity)
        if compiled is None:
            return "it was not compiled"
        results, sharing = [], []
        for run in (plain, compiled):
            for buffer in buffers:
                buffer.zero_()
            kept = run(list(args))
            sharing.append(_sharing(kept))
            results.append([*kept, *(b.narrow(2, 0, 1).clone() for b in buffers)])
        for buffer in buffers:
            buffer.zero_()
        self._tiers[capacity].verified = True
        if sharing[0] != sharing[1]:
            return "what it keeps shares memory otherwise"
        return disagreement(results[1], results[0])


def _sharing(values: Sequence[Tensor | None]) -> list[int]:
    """For each value the number of the first that it shares memory with."""
    first: dict[int, int] = {}
    return [
        -1 if v is None else first.setdefault(v.untyped_storage()._cdata, k) for k, v in enumerate(values)
    ]
