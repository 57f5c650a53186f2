"""An executor over a pool of servers: plans each window once, then follows the plan.

Programs are collected until something is read; such a window is merged into one graph, annotated and
planned (`genie.scheduler`). What was planned is remembered by the programs' templates and by where their
inputs are, so that a window met again is not even collected: each program goes out as it is recorded.
What is remembered decides only *where* things run. What must move for that is found anew each time from
where the values really are, so a window that goes on otherwise than the one before is still right.
"""

from __future__ import annotations

import copy
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from genie.errors import ConfigError, GenieError, PeerError, RemoteError, ServerLostError
from genie.frontend.program import Outcome, Program
from genie.frontend.specs import to_wire
from genie.runtime.connection import fetched_tensors
from genie.runtime.graphs import graph_of, hints_of
from genie.runtime.known import MAX_KNOWN, Effects, Known, KnownWindows, sizes_of
from genie.runtime.layout import joined
from genie.runtime.link import SHARED_BYTES, ServerLink, inline_inputs
from genie.runtime.peers import TIMEOUT_S, PeerGroup
from genie.runtime.placement import UNNUMBERED, Placement, Uploaded, wire_spec
from genie.runtime.slicing import Slicer
from genie.runtime.steps import Move, Narrow, Need, Run, Slices
from genie.runtime.window import Memory, Window, instructions, merge
from genie.scheduler.batch_axis import prove
from genie.scheduler.cluster import Cluster, CostModel, Device, Link
from genie.scheduler.nominal import NominalCost
from genie.scheduler.plan import BatchSplit, Plan
from genie.scheduler.problem import Policy, Problem
from genie.scheduler.schedule import schedule
from genie.scheduler.where import Shard, Where
from genie.wire.messages import Load, LoadReply, Offer, Result, TensorSpec, Wanted

INLINE_BYTES = 64 << 10
CHUNK = 128
#: a window is planned at the latest when it has this many instructions, or holds so many bytes of inputs
MAX_WINDOW = 16_384
MAX_HELD_BYTES = 256 << 20
#: numbers of instructions in parts of programs count from here, `_STRIDE` for each part; the first is no part
_PARTS, _STRIDE = UNNUMBERED, 1 << 20
_MAX_PARTS = 4096
#: of a server's memory is left for activations, as long as another server has room for the parameters
_SPARE = 0.25


@dataclass
class Explained:
    """A window that was planned, for people: see `genie.scheduler.explain`. ``seconds``: what annotation
    and planning took."""

    problem: Problem
    plan: Plan
    seconds: float


class PoolExecutor:
    """Programs run on ``links`` as ``policies`` decide. ``costs``: a model for each server; without them
    the scheduler knows nominal rates only. ``peer``: what is between two servers, None where they cannot
    reach each other."""

    inline_bytes = INLINE_BYTES
    chunk = CHUNK

    def __init__(
        self,
        links: Sequence[ServerLink],
        policies: Sequence[Policy],
        *,
        costs: Sequence[CostModel] | None = None,
        client_links: Sequence[Link] | None = None,
        peer: Link | None = None,
        peer_timeout_s: float = TIMEOUT_S,
    ) -> None:
        if not links:
            raise ConfigError("a pool needs one server at least")
        self.links = tuple(links)
        self.policies = list(policies)
        self.plan_s = 0.0
        self.planned = 0
        self.explained: deque[Explained] = deque(maxlen=64)
        #: the plans of the windows that ran last
        self.followed: deque[Plan] = deque(maxlen=1024)
        self._nominal = costs is None
        self._costs: list[CostModel] = list(costs) if costs is not None else [NominalCost() for _ in links]
        self._client_links = list(client_links or [])
        self._peer = peer
        self._peers = PeerGroup(peer_timeout_s)
        self._at = Placement(links, self._peers)
        self._parameters: set[int] = set()
        self.turn = 0  # programs run so far, for policies that take turns
        self._home = -1  # has the session's random state
        self._upload_to = -1
        #: the random state was used, and then lost with its server
        self._drew = self._random_lost = False
        self._pending: list[Program] = []
        self._pending_ops = 0
        self._running: list[Program] = []  # of the present window, not done with
        self._known = KnownWindows()
        self._parts: OrderedDict[int, tuple[int, list[int]]] = OrderedDict()
        self._part = 0
        self._effects: dict[tuple[bytes, bytes], Effects] = {}
        self._lost: dict[int, ServerLostError] = {}
        self._busy = [0.0] * len(links)
        self.last_server = 0

    # -- contents ------------------------------------------------------------------------------------

    def upload(self, handle: int, tensor: Tensor, is_parameter: bool) -> None:
        """Parameters go to a server at once; other values when a program needs them somewhere, unless the
        client holds `MAX_HELD_BYTES` of such already. Raises ServerLostError when no server is left."""
        at = self._at
        if not is_parameter and at.host_bytes + tensor.nbytes <= MAX_HELD_BYTES:
            at.keep_on_host(handle, tensor.clone(memory_format=torch.preserve_format))
            return
        while True:
            try:
                server = self._server_for(tensor)
                digest = self.links[server].upload(handle, tensor, is_parameter)
                break
            except ServerLostError as exc:
                # Only what it had is lost: this value was not there yet.
                if not self._lose_dead(exc):
                    raise
        at.held[server] += tensor.nbytes
        at.bind((handle,), at.single[server])
        if is_parameter:
            at.uploaded[handle] = Uploaded(wire_spec(tensor), digest)
            self._parameters.add(handle)

    def _server_for(self, tensor: Tensor) -> int:
        """Uploads go to one server: where such content is already, else to the least loaded. What would leave
        it less than `_SPARE` of its memory goes to another that has more room."""
        at = self._at
        if self._home < 0:
            self._home = self._choose_home(tensor)
        if self._upload_to < 0 or self._upload_to in self._lost:
            self._upload_to = self._home
        if self._room(self._upload_to) < tensor.nbytes:
            # What was released since is not in our account.
            at.held[self._upload_to] = self.links[self._upload_to].counters().held_bytes
            if self._room(self._upload_to) < tensor.nbytes:
                self._upload_to = max(self.alive, key=self._room)
        return self._upload_to

    def _room(self, server: int) -> float:
        limit = self.links[server].connection.welcome.memory_limit
        return limit * (1 - _SPARE) - self._at.held[server] if limit else float("inf")

    def _choose_home(self, tensor: Tensor | None = None) -> int:
        alive = self.alive
        if not alive:
            raise copy.copy(next(iter(self._lost.values())))
        if tensor is not None and tensor.nbytes >= SHARED_BYTES:
            alive = [s for s in alive if self._has(s, tensor)] or alive
        return min(alive, key=lambda s: (*self._load(s), s))

    def _has(self, server: int, tensor: Tensor) -> bool:
        digest, nbytes = self.links[server].digest(tensor)
        wanted, _ = self.links[server].connection.request(Offer([digest], [nbytes]))
        assert isinstance(wanted, Wanted)
        return not wanted.missing

    def _load(self, server: int) -> tuple[int, int]:
        load, _ = self.links[server].connection.request(Load())
        assert isinstance(load, LoadReply)
        return load.sessions, load.held_bytes

    # -- programs ------------------------------------------------------------------------------------

    def execute(self, program: Program, fetch: list[int], describe: list[int]) -> Outcome:
        at = self._at
        for handle, value in program.inputs:
            at.keep_on_host(handle, value)
        if program.entries:
            self._running.append(program)
        try:
            outcome = self._execute(program, fetch, describe)
        except GenieError as exc:
            cause = self._root_cause(exc)
            self._abandon(cause)
            if cause is exc:
                raise
            raise cause from exc
        if not self._pending:
            self._running.clear()
        return outcome

    def _abandon(self, cause: GenieError) -> None:
        """The present window ends here: what it did not make is not there, and raises ``cause``."""
        at = self._at
        for program in self._running:
            at.fail(program.kept_handles(), cause)
            for i in program.fresh:
                program.entries[i].checked = False  # whether the prediction is true is still unknown
        for program in self._running:
            at.release(program.release, -1)
        self._running, self._pending, self._pending_ops = [], [], 0
        self._known.begin()

    def _execute(self, program: Program, fetch: list[int], describe: list[int]) -> Outcome:
        reads = bool(fetch or describe)
        if not program.entries:
            if self._pending and reads:
                self._run_pending([])
            if self._pending:
                self._pending[-1].release += program.release
                program.release = []
                return Outcome()
            outcome = self._read(fetch, describe) if reads else Outcome()
            self._at.release(program.release, -1)
            if not reads:
                self._at.send_releases()
            else:
                self._known.begin()
            return outcome
        if not self._pending:
            known = self._match(program)
            if known is not None:
                outcome = self._run(program, known, fetch, describe)
                if reads:
                    self._known.begin()
                else:
                    self._known.follow(known)
                return outcome
        self._pending.append(program)
        self._pending_ops += len(program.entries)
        late = self._pending_ops > MAX_WINDOW or self._at.host_bytes > MAX_HELD_BYTES
        if reads or late or program.fresh:
            outcome = self._run_pending(fetch, describe)
            if reads or late:
                self._known.begin()
            return outcome
        return Outcome()

    def _match(self, program: Program) -> Known | None:
        for known in self._known.following(self._key(program)):
            if known.fits(program) and self._may_run(program, known):
                return known
        return None

    def _may_run(self, program: Program, known: Known) -> bool:
        """Whether what it writes to, or makes views of, may be written to where it did before."""
        at = self._at
        if not at.origin:  # nothing has copies
            return True
        if known.slices is not None:
            homes = known.slices.homes
        else:
            homes = [(k, (known.server,)) for k in self._effects_of(program).held]
        return all(len(servers) > 1 or at.may_be_home(program.ext[k], servers[0]) for k, servers in homes)

    def _effects_of(self, program: Program) -> Effects:
        effects = self._effects.get(program.key)
        if effects is None:
            if len(self._effects) >= MAX_KNOWN:
                self._effects.clear()
            effects = self._effects[program.key] = Effects.of(program)
        return effects

    def _key(self, program: Program) -> tuple:
        return (program.key, tuple(map(self._at.where.get, program.ext)), hints_of(program))

    def _run_pending(self, fetch: list[int], describe: Sequence[int] = ()) -> Outcome:
        """Plans what is pending as one window, and runs it; the last program's outcome."""
        programs, self._pending, self._pending_ops = self._pending, [], 0
        fresh = any(p.fresh for p in programs)
        plans = self._plan(programs, fetch)
        plans[-1].ends = not (fetch or describe)
        outcome = Outcome()
        for program, known in zip(programs, plans, strict=True):
            # By where its inputs are now, as they will be when the program comes again; but what was uploaded
            # long ago (parameters, buffers) stays where this run takes it.
            before = [self._at.where.get(h) for h in program.ext]
            last = program is programs[-1]
            outcome = self._run(program, known, fetch if last else [], list(describe) if last else [])
            del self._running[0]
            known.unmet = None  # what was uploaded long ago need not move again
            if not fresh:
                now = self._at.where
                places = tuple(
                    now.get(h) if h < 0 and n else n for h, n in zip(program.ext, before, strict=True)
                )
                self._known.learn((program.key, places, hints_of(program)), known)
        if fresh:
            # Planned without knowing whether the predicted layouts are true: planned anew the next time.
            self._known.stray()
        return outcome

    # -- planning ------------------------------------------------------------------------------------

    def _plan(self, programs: list[Program], fetch: Sequence[int]) -> list[Known]:
        started = time.perf_counter()
        if self._home < 0:
            self._home = self._choose_home()
        window = merge(programs)
        problem = self._problem(window, fetch, not any(p.fresh for p in programs))
        self._check_random(problem)
        plan = schedule(problem, self.policies)
        known = self._known_of(window, problem, plan)
        seconds = time.perf_counter() - started
        self.plan_s += seconds
        self.planned += 1
        self.explained.append(Explained(problem, plan, seconds))
        return known

    def _check_random(self, problem: Problem) -> None:
        """Random numbers must not go on from another state unnoticed."""
        random = problem.flow.random
        if not random:
            return
        if self._random_lost and problem.graph.nodes[min(random)].op not in _SEEDS:
            raise ServerLostError(
                "the session's random state was on a server that is lost: call torch.manual_seed() before "
                "drawing more random numbers"
            )
        self._drew, self._random_lost = True, False

    def _problem(self, window: Window, fetch: Sequence[int], may_split: bool) -> Problem:
        at, program = self._at, window.program
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
        where = {-k - 1: self._as_device(place) for k, place in enumerate(places)}
        shared = {-k - 1 for k, h in enumerate(program.ext) if len(at.sharing(h)) > 1}
        alias = {v: at.alias[program.ext[-v - 1]] for v in shared}
        # What gets a view that stays must be where the view will be: where it is now.
        viewed = {root for _, root in effects.views if root < 0}
        movable = frozenset(where.keys() - shared - viewed)
        for s in self.alive:
            if self.links[s].connection.welcome.memory_limit:
                at.held[s] = self.links[s].counters().held_bytes
        return Problem(
            graph, self.cluster(), where, alias, window.starts, may_split, prove, self.turn, movable
        )

    @property
    def alive(self) -> list[int]:
        """The servers that are not lost. The scheduler numbers its devices by their places here."""
        return [s for s in range(len(self.links)) if s not in self._lost]

    def _as_device(self, place: Where) -> Where:
        if not self._lost:
            return place
        number = {s: k for k, s in enumerate(self.alive)}
        return Where(
            tuple(number[s] for s in place.servers),
            place.axis,
            tuple(Shard(number[x.server], x.start, x.stop) for x in place.shards),
        )

    def cluster(self) -> Cluster:
        """The servers that are alive, as the scheduler sees them now."""
        devices = []
        alive = self.alive
        for k, s in enumerate(alive):
            link = self.links[s]
            welcome = link.connection.welcome
            client = self._client_links[s] if s < len(self._client_links) else Link(2e-4, 1e9)
            devices.append(
                Device(
                    k, welcome.device, self._costs[s], client, welcome.memory_limit, self._at.held[s],
                    self._busy[s],
                )
            )  # fmt: skip
        peer = self._peer if len(alive) > 1 else None
        return Cluster(tuple(devices), peer, alive.index(self._home))

    def _known_of(self, window: Window, problem: Problem, plan: Plan) -> list[Known]:
        servers, split = plan.placement.servers, plan.placement.split
        if self._lost:
            alive = self.alive
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

    # -- running -------------------------------------------------------------------------------------

    def _run(self, program: Program, known: Known, fetch: list[int], describe: list[int]) -> Outcome:
        self.turn += 1
        if known.plan is not None:
            self.followed.append(known.plan)
            if not self._lost:
                for s, seconds in enumerate(known.plan.busy_s):
                    self._busy[s] += seconds
        if known.slices is not None:
            self._run_slices(program, known, known.slices)
            return self._read(fetch, describe) if fetch or describe else Outcome()
        return self._run_whole(program, known, fetch, describe)

    def _run_whole(self, program: Program, known: Known, fetch: list[int], describe: list[int]) -> Outcome:
        at, s = self._at, known.server
        if s in self._lost:
            raise copy.copy(self._lost[s])
        link, where, single = self.links[s], at.where, at.single[s]
        inputs: list[tuple[int, Tensor]] = []
        elsewhere: list[int] = []
        for h in program.ext:
            n = where.get(h)
            if n != single:
                if n == 0 and at.host[h].nbytes <= INLINE_BYTES:
                    inputs.append((h, at.host[h]))
                    at.left_host(h, s)
                elif n is None or s not in at.places[n].servers:
                    elsewhere.append(h)
        if elsewhere:
            at.ensure(elsewhere, [Need((s,))] * len(elsewhere), self._specs(program, elsewhere))
        program.inputs = inputs
        wire, buffers, owners = inline_inputs(program)
        self._bind_results(program, s)
        whole = all(s in at.place(h).servers for h in fetch)
        dead = at.take_dead(s)  # before this program's own are among them
        releases = at.release(program.release, s) if program.release else []
        request = link.message(
            self._checkable(program) if program.fresh and at.restrided else program,
            releases,
            inputs=wire,
            fetch=fetch if whole else [],
            describe=describe,
            quiet=not ((fetch and whole) or describe or program.fresh),
            release=dead,
        )
        link.timings.capture += program.capture_s
        link.send(request, buffers)
        del owners
        self.last_server = s
        if request.quiet:
            return self._read(fetch, describe) if fetch else Outcome()
        result, payload = self._receive(link)
        self._busy[s] = 0.0
        outcome = Outcome([], result.described, result.relayouts, result.receipt)
        if fetch:
            outcome.fetched = fetched_tensors(result, payload) if whole else self._read(fetch, []).fetched
        return outcome

    def _checkable(self, program: Program) -> Program:
        """Without the checks of views of values that are not laid out as they were when recorded."""
        moved = {-k - 1 for k, h in enumerate(program.ext) if h in self._at.restrided}
        if not moved:
            return program
        memory, code = Memory.of(program), instructions(program.key[0])
        entries = program.entries
        fresh = [i for i in program.fresh if not (entries[i].views and memory.root_of_view(code[i]) in moved)]
        return replace(program, fresh=fresh)

    def _bind_results(self, program: Program, s: int) -> None:
        effects = self._effects.get(program.key) or self._effects_of(program)
        at, base, single = self._at, program.base, self._at.single[s]
        where = at.where
        for slot in effects.kept:
            where[base + slot] = single
        if effects.held:
            self._hold(program, [(k, (s,)) for k in effects.held], effects)
        for slot, root in effects.views:
            at.share(base + slot, program.ext[-root - 1] if root < 0 else base + root)

    def _hold(self, program: Program, homes: Sequence[tuple[int, tuple[int, ...]]], effects: Effects) -> None:
        """What the program writes to, or keeps views of, has its memory there from now on."""
        at = self._at
        for k, servers in homes:
            h = program.ext[k]
            at.settle_home(h, servers[0])
            if k in effects.written:
                at.write(h, servers[0])

    def _specs(self, program: Program, handles: Sequence[int]) -> Callable[[], list[TensorSpec | None]]:
        def specs() -> list[TensorSpec | None]:
            found = merge([program])
            by_handle = dict(zip(found.program.ext, found.specs, strict=True))
            return [None if (s := by_handle.get(h)) is None else to_wire(s) for h in handles]

        return specs

    def _run_slices(self, program: Program, known: Known, slices: Slices) -> None:
        at, base, ext = self._at, program.base, program.ext

        def name_of(slot: int) -> int:
            return base + slot if slot >= 0 else ext[-slot - 1]

        effects = self._effects_of(program)
        if known.unmet is None:
            known.unmet = at.unmet(ext, slices.needs)
        at.ensure(ext, slices.needs, self._specs(program, ext), known.unmet)
        self._hold(program, slices.homes, effects)
        parts: dict[tuple[int, int], int] = {}
        temporary: dict[int, int] = {}
        self.links[self.alive[0]].timings.capture += program.capture_s
        for step in slices.steps:
            if isinstance(step, Run):
                if step.server in self._lost:
                    raise copy.copy(self._lost[step.server])
                run = step.bind(program, temporary, checked=bool(program.fresh))
                run.first = self._part_number(program.first, step.numbers)
                run.trace, program.trace = program.trace, None
                self._send_run(run, step.server)
                at.dead[step.server] += [temporary[number] for number in step.done]
            elif isinstance(step, Move):
                name = at.move(step, name_of)
                if step.temporary is not None:
                    parts[step.temporary, step.part] = temporary[step.temporary] = name
            elif isinstance(step, Narrow):
                temporary[step.number] = at.narrow(step, name_of)
            else:
                temporary[step.number] = at.gather(step, name_of, parts)
        for server, slots in slices.leftover.items():
            at.dead[server] += map(name_of, slots)
        for slot, place in slices.kept:
            h = base + slot
            at.where[h] = at.number(place)
            if len(place.servers) > 1:
                at.origin[h] = place.servers[0]
        for slot, root in effects.views:
            at.share(base + slot, name_of(root))
        at.release(program.release, -1)
        program.release = []

    def _send_run(self, run: Program, server: int) -> None:
        link = self.links[server]
        request = link.message(run, run.release, quiet=not run.fresh, release=self._at.take_dead(server))
        link.send(request, [])
        if run.fresh:
            result, _ = self._receive(link)
            for r in result.relayouts:
                run.entries[r.instruction].correct(r.output, r.stride)

    def _part_number(self, first: int, numbers: list[int]) -> int:
        """Where the instructions of a part count from, so that an error can be traced to the whole."""
        self._part += 1
        number = _PARTS + self._part * _STRIDE
        self._parts[number] = (first, numbers)
        if len(self._parts) > _MAX_PARTS:
            self._parts.popitem(last=False)
        return number

    # -- reading -------------------------------------------------------------------------------------

    def _read(self, fetch: list[int], describe: Sequence[int]) -> Outcome:
        """One request to each server that has something to read; all are out before any is awaited."""
        at = self._at
        on_host = {h: at.host[h] for h in fetch if at.where.get(h) == 0}
        wanted: dict[int, list[int]] = {}
        pieces: dict[int, list[int]] = {}
        for h in fetch:
            if h not in on_host and h not in pieces:
                pieces[h] = at.pieces(h, self.last_server)
                for s in pieces[h]:
                    wanted.setdefault(s, []).append(h)
        asked: dict[int, list[int]] = {}
        for h in describe:
            s = at.pieces(h, self.last_server)[0]
            asked.setdefault(s, []).append(h)
            wanted.setdefault(s, [])
        empty = Program(
            key=(b"", b""), n_ext=0, n_slots=0, literals=[], floats=[], ext=[], base=0, inputs=[],
            release=[], entries=[], fresh=[],
        )  # fmt: skip
        failures: list[GenieError] = []
        sent: dict[int, list[int]] = {}
        for s, handles in wanted.items():
            link = self.links[s]
            request = link.message(empty, fetch=handles, describe=asked.get(s, []), release=at.take_dead(s))
            try:
                link.send(request, [])
            except GenieError as exc:
                failures.append(exc)
                continue
            sent[s] = handles
        got: dict[tuple[int, int], Tensor] = {}
        described: dict[int, TensorSpec] = {}
        for s, handles in sent.items():
            try:
                result, payload = self._receive(self.links[s])
            except GenieError as exc:
                failures.append(exc)
                continue
            self._busy[s] = 0.0
            got.update({(h, s): t for h, t in zip(handles, fetched_tensors(result, payload), strict=True)})
            described.update(zip(asked.get(s, []), result.described, strict=True))
        if failures:
            raise _first(failures)
        fetched = []
        for h in fetch:
            if h in on_host:
                fetched.append(on_host[h].clone(memory_format=torch.preserve_format))
            elif len(pieces[h]) == 1:
                fetched.append(got[h, pieces[h][0]])
            else:
                axis = at.place(h).axis
                assert axis is not None
                fetched.append(joined([got[h, s] for s in pieces[h]], axis.dim))
        return Outcome(fetched, [described[h] for h in describe])

    def _receive(self, link: ServerLink) -> tuple[Result, Tensor]:
        try:
            return link.receive()
        except RemoteError as exc:
            self._number(exc)
            raise

    def _number(self, exc: GenieError) -> None:
        """The instruction that an error names, counted in the whole program."""
        n = getattr(exc, "instruction", -1)
        if n >= _PARTS:
            start = n - n % _STRIDE
            first, numbers = self._parts.get(start, (-1, []))
            place = n - start
            exc.instruction = first + numbers[place] if place < len(numbers) else -1  # type: ignore[attr-defined]

    def _root_cause(self, exc: GenieError) -> GenieError:
        """The error behind ``exc``: what a server waited for failed elsewhere. No server is left with an
        error that it has not told, which a later read would take for its own."""
        lost = self._lose_dead(exc)
        if not isinstance(exc, RemoteError):
            return lost or exc
        failures: list[GenieError] = [exc]
        for s, link in enumerate(self.links):
            if s in self._lost:
                continue
            try:
                link.settle()
            except ServerLostError as gone:
                lost = self._lose_dead(gone) or lost
            except RemoteError as cause:
                self._number(cause)
                failures.append(cause)
        first = _first(failures)
        if isinstance(first, PeerError) and self._lost:
            lost = lost or copy.copy(next(reversed(self._lost.values())))
        return lost if lost is not None and isinstance(first, PeerError | ServerLostError) else first

    # -- members -------------------------------------------------------------------------------------

    def _lose_dead(self, exc: GenieError) -> ServerLostError | None:
        """Takes note of the servers whose connections have ended; the first one's error, if there is one."""
        found: ServerLostError | None = None
        for s, link in enumerate(self.links):
            if s in self._lost or link.connection.alive:
                continue
            lost = exc if isinstance(exc, ServerLostError) and found is None else link.connection.lost
            if not isinstance(lost, ServerLostError):
                continue
            found = found or lost
            self._lose(s, lost)
        return found

    def _lose(self, s: int, exc: ServerLostError) -> None:
        """What only that server had is gone; the others go on."""
        self._lost[s] = exc
        self._peers.dissolve()
        self._known.forget()
        self._at.lose(s)
        if self._home == s:
            self._home = -1
            self._random_lost = self._drew

    def add(self, link: ServerLink, cost: CostModel | None = None, client: Link | None = None) -> None:
        """One more server, from the next window that is planned on."""
        self.links = (*self.links, link)
        self._at.grow(link)
        self._busy.append(0.0)
        self._costs.append(cost if cost is not None else NominalCost())
        missing = len(self.links) - 1 - len(self._client_links)
        if client is not None:
            self._client_links += [Link(2e-4, 1e9)] * missing + [client]
        link.begin(self.links[0].nonce)
        self._peers.dissolve()
        self._known.forget()

    def close(self) -> None:
        self._pending = []
        for link in self.links:
            link.close()


_SEEDS = frozenset({"genie::manual_seed", "genie::set_rng_state"})


def _first(failures: list[GenieError]) -> GenieError:
    """The one to tell: no mere consequence of another, and the earliest."""

    def rank(exc: GenieError) -> tuple[bool, int, bool]:
        n = getattr(exc, "instruction", -1)
        return isinstance(exc, PeerError), n if n >= 0 else 1 << 62, "could not make it" in str(exc)

    return min(failures, key=rank)
