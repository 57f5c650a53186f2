"""What is to run where: merges the programs of a window, has them planned, and cuts them as the plan says."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from genie.frontend.program import Program
from genie.frontend.specs import to_wire
from genie.runtime.graphs import graph_of
from genie.runtime.known import Effects, Known, sizes_of
from genie.runtime.members import Members
from genie.runtime.placement import Placement, wire_spec
from genie.runtime.slicing import Slicer
from genie.runtime.window import Window, merge
from genie.scheduler.batch_axis import prove
from genie.scheduler.plan import BatchSplit, Plan
from genie.scheduler.problem import Policy, Problem
from genie.scheduler.schedule import schedule
from genie.scheduler.where import Shard, Where

_SEEDS = frozenset({"genie::manual_seed", "genie::set_rng_state"})


@dataclass
class Explained:
    """A window that was planned, for people: see `genie.scheduler.explain`. ``seconds``: what annotation
    and planning took."""

    problem: Problem
    plan: Plan
    seconds: float


class Planner:
    """Plans windows for ``members`` from where their inputs are (``at``). ``parameters``: the handles of all
    uploaded Parameters. ``plan_s``: seconds spent; ``planned``: windows; ``explained``: the last of them."""

    def __init__(
        self, policies: Sequence[Policy], members: Members, at: Placement, parameters: Collection[int]
    ) -> None:
        self.policies = list(policies)
        self.plan_s = 0.0
        self.planned = 0
        self.explained: deque[Explained] = deque(maxlen=64)
        self._members = members
        self._at = at
        self._parameters = parameters

    def plan(self, programs: Sequence[Program], fetch: Sequence[int], turn: int) -> list[Known]:
        """How each of the programs runs; together they are one window, of which ``fetch`` is read. ``turn``:
        how many programs ran before. Raises PlanError, ServerLostError, and what kept an input from being
        made."""
        started = time.perf_counter()
        self._members.require_home()
        window = merge(programs)
        problem = self._problem(window, fetch, not any(p.fresh for p in programs), turn)
        random = problem.flow.random
        if random:
            self._members.draw(seeded=problem.graph.nodes[min(random)].op in _SEEDS)
        plan = schedule(problem, self.policies)
        known = self._known_of(window, problem, plan)
        seconds = time.perf_counter() - started
        self.plan_s += seconds
        self.planned += 1
        self.explained.append(Explained(problem, plan, seconds))
        return known

    def _problem(self, window: Window, fetch: Sequence[int], may_split: bool, turn: int) -> Problem:
        at, members, program = self._at, self._members, window.program
        effects = Effects.of(program, window.memory)
        places = [at.place(h) for h in program.ext]
        for k in effects.held:
            # Copies do not count for what is written to, or gets views that stay: its memory is in one place.
            h = program.ext[k]
            if len(places[k].servers) > 1:
                places[k] = Where(servers=(at.origin.get(h, places[k].servers[0]),))
        specs = [
            to_wire(s) if s is not None else wire_spec(at.host[h])
            for h, s in zip(program.ext, window.specs, strict=True)
        ]
        graph = graph_of(program, specs, program.ext, self._parameters, fetch)
        where = {-k - 1: members.as_device(place) for k, place in enumerate(places)}
        shared = {-k - 1 for k, h in enumerate(program.ext) if len(at.aliases.sharing(h)) > 1}
        alias = {v: at.aliases.group[program.ext[-v - 1]] for v in shared}
        # What gets a view that stays must be where the view will be: where it is now.
        viewed = {root for _, root in effects.views if root < 0}
        movable = frozenset(where.keys() - shared - viewed)
        for s in members.alive:
            if members.links[s].connection.welcome.memory_limit:
                at.held[s] = members.links[s].counters().held_bytes
        return Problem(graph, members.cluster(), where, alias, window.starts, may_split, prove, turn, movable)

    def _known_of(self, window: Window, problem: Problem, plan: Plan) -> list[Known]:
        servers, split = plan.placement.servers, plan.placement.split
        if self._members.lost:
            alive = self._members.alive
            servers = tuple(tuple(alive[s] for s in placed) for placed in servers)
            if split is not None:
                shards = tuple(Shard(alive[x.server], x.start, x.stop) for x in split.shards)
                split = BatchSplit(split.batch, shards)
        merged = window.program
        place_of = {h: -k - 1 for k, h in enumerate(merged.ext)}
        known = []
        ends = [*window.starts[1:], len(servers)]
        for program, start, end in zip(window.programs, window.starts, ends, strict=True):
            own = servers[start:end]
            begun = plan if start == 0 else None
            if all(len(s) == 1 for s in own) and len(set(own)) == 1:
                server = own[0][0]
                known.append(Known(server, plan=begun))
                continue
            shift = program.base - merged.base
            value = {slot: slot + shift for slot in range(program.n_slots)}
            for k, h in enumerate(program.ext):
                value[-k - 1] = h - merged.base if h >= merged.base else place_of[h]
            spec = problem.graph.wiring.spec
            specs = {slot: spec.get(v) for slot, v in value.items()}
            # What enters the program by rows was made so by an earlier one.
            slicer = Slicer(program, own, split, value, specs, start)
            slices = slicer.slices()
            sizes = sizes_of(program)
            known.append(Known(own[0][0], slices, list(sizes) if isinstance(sizes, list) else sizes, begun))
        return known
