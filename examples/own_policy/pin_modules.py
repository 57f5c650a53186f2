"""A scheduling policy of one's own: modules that stay on a server of your choice.

    session = genie.connect(..., policies=[PinModules({"lm_head": 1})])

An installed package can offer it to every session instead: see pyproject.toml beside this file. A policy
proposes; the scheduler checks the proposal, adds the transfers that it needs, predicts its time, and takes
it if nothing is faster. `genie explain` shows it among the alternatives either way.
"""

import os

from genie.scheduler.placing import completed, settled
from genie.scheduler.plan import Declined, Placement


class PinModules:
    """Two things make a policy: a name, and propose(problem). It must not change anything, and give the
    same proposals for the same problem."""

    name = "pin_modules"

    def __init__(self, pins):
        """``pins``: prefix of a module's path -> number of the server that runs it."""
        self.pins = pins

    def propose(self, problem):
        count = len(problem.cluster.devices)
        missing = {s for s in self.pins.values() if not 0 <= s < count}
        if missing:
            return [Declined(self.name, f"there are {count} servers, and no {sorted(missing)}")]
        pinned = [self._server(node.module) for node in problem.graph.nodes]
        if not any(pinned):
            return [Declined(self.name, f"no module {', '.join(self.pins)} here")]
        # All others run on the home server. What has no module (None) follows its inputs or its readers;
        # what shares memory that is written to, and random ops, are put where they must be.
        home = (problem.cluster.home,)
        wish = [
            server or (None if node.module is None else home)
            for node, server in zip(problem.graph.nodes, pinned, strict=True)
        ]
        servers = settled(problem, completed(problem, wish))
        return [Placement(self.name, servers, f"pinned: {self.pins}")]

    def _server(self, module):
        for prefix, server in self.pins.items():
            if module is not None and (module == prefix or module.startswith(prefix + ".")):
                return (server,)
        return None


def from_environment():
    """What the entry point calls: GENIE_PIN_MODULES is like "lm_head=1,transformer.wte=1"."""
    pairs = [pair.split("=") for pair in os.environ.get("GENIE_PIN_MODULES", "").split(",") if pair]
    return PinModules({prefix: int(server) for prefix, server in pairs})
