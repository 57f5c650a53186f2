"""Phase-aware prefill: a compute-bound phase is split by batch over the pool; a decode stays together."""

from __future__ import annotations

from collections.abc import Sequence

from genie.scheduler.batch_split import batch_splits
from genie.scheduler.plan import Declined, Placement
from genie.scheduler.problem import Problem
from genie.scheduler.towers import stream
from genie.srg.cost import COMPUTE
from genie.srg.graph import Phase


class Prefill:
    name = "prefill"

    def propose(self, problem: Problem) -> Sequence[Placement | Declined]:
        nodes = problem.graph.nodes
        phases = {n.phase for n in nodes if n.name in COMPUTE}
        if Phase.DECODE in phases:
            return [Declined(self.name, "decode is bound by memory bandwidth; its cache stays on one server")]
        if phases <= {Phase.UNKNOWN}:
            return [Declined(self.name, "no compute-bound phase was recognised")]
        if any(n.stage is not None for n in nodes) or stream(problem):
            return [Declined(self.name, "convolution stages or a stream: that is for pipelining")]
        return batch_splits(problem, self.name)
