"""An executor over a pool of servers: plans each window once, then follows the plan.

Programs are collected until something is read; such a window is merged into one graph, annotated and
planned (`genie.scheduler`). What was planned is remembered by the programs' templates and by where their
inputs are, so that a window met again is not even collected: each program goes out as it is recorded.
What is remembered decides only *where* things run. What must move for that is found anew each time from
where the values really are, so a window that goes on otherwise than the one before is still right.
"""

from __future__ import annotations

import time
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from genie.errors import ConfigError, GenieError, PeerError, RemoteError, ServerLostError
from genie.frontend.program import Outcome, Program
from genie.frontend.specs import to_wire
from genie.runtime.connection import fetched_tensors
from genie.runtime.graphs import graph_of
from genie.runtime.link import SHARED_BYTES, ServerLink, inline_inputs
from genie.runtime.peers import TIMEOUT_S, PeerGroup
from genie.runtime.placement import Placement, Uploaded, wire_spec
from genie.runtime.slicing import Gather, Move, Need, Run, Slicer, Slices
from genie.runtime.window import Window, instructions, merge
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
MAX_KNOWN = 4096
#: numbers of instructions in parts of programs count from here, `_STRIDE` for each part
_PARTS, _STRIDE = 1 << 40, 1 << 15


@dataclass
class Explained:
    """A window that was planned, for people: see `genie.scheduler.explain`. ``seconds``: what annotation
    and planning took."""

    problem: Problem
    plan: Plan
    seconds: float


@dataclass
class _Known:
    """What follows a sequence of programs since the last read, and how the last of them runs."""

    server: int = 0  # all of it, where ``slices`` is None
    slices: Slices | None = None
    sizes: Sequence | None = None  # for which it was cut by rows; None: for any
    plan: Plan | None = None  # where it begins to be followed
    next: dict[tuple, list[_Known]] = field(default_factory=dict)

    def fits(self, program: Program) -> bool:
        return self.sizes is None or self.sizes == _sizes(program)


def _sizes(program: Program) -> Sequence:
    """Equal for programs of one template if all their sizes are equal."""
    return program.entries if program.sizes is None else program.sizes


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
        self._home = -1
        self._pending: list[Program] = []
        self._pending_ops = 0
        self._root = _Known()
        self._cursor = self._root
        self._known = 0
        self._parts: OrderedDict[int, tuple[int, list[int]]] = OrderedDict()
        self._part = 0
        self._static: dict[tuple[bytes, bytes], _Static] = {}
        self._lost: dict[int, GenieError] = {}
        self._busy = [0.0] * len(links)
        self.last_server = 0

    # -- contents ------------------------------------------------------------------------------------

    def upload(self, handle: int, tensor: Tensor, is_parameter: bool) -> None:
        if not is_parameter:
            self._at.keep_on_host(handle, tensor.clone(memory_format=torch.preserve_format))
            return
        server = self._server_for(tensor)
        digest = self.links[server].upload(handle, tensor, True)
        self._at.held[server] += tensor.nbytes
        self._at.uploaded[handle] = Uploaded(wire_spec(tensor), digest)
        self._at.bind((handle,), self._at.single[server])
        self._parameters.add(handle)

    def _server_for(self, tensor: Tensor) -> int:
        """Parameters go to one server: where they are already, else to the least loaded. What it cannot
        hold goes to the one with the most room."""
        if self._home < 0:
            self._home = self._choose_home(tensor)
        limit = self.links[self._home].connection.welcome.memory_limit
        if limit and self._at.held[self._home] + tensor.nbytes > limit:
            rooms = {
                s: link.connection.welcome.memory_limit - self._at.held[s]
                for s, link in enumerate(self.links)
                if s not in self._lost
            }
            unlimited = [s for s, link in enumerate(self.links) if not link.connection.welcome.memory_limit]
            self._home = unlimited[0] if unlimited else max(rooms, key=lambda s: rooms[s])
        return self._home

    def _choose_home(self, tensor: Tensor | None = None) -> int:
        alive = [s for s in range(len(self.links)) if s not in self._lost]
        if not alive:
            raise next(iter(self._lost.values()))
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
        try:
            return self._execute(program, fetch, describe)
        except GenieError as exc:
            self._pending, self._pending_ops, self._cursor = [], 0, self._root
            cause = self._root_cause(exc)
            if cause is exc:
                raise
            raise cause from exc

    def _execute(self, program: Program, fetch: list[int], describe: list[int]) -> Outcome:
        reads = bool(fetch or describe)
        if not program.entries:
            if self._pending and reads:
                self._run_pending([])
            if self._pending:
                self._pending[-1].release += program.release
                return Outcome()
            outcome = self._read(fetch, describe) if reads else Outcome()
            self._at.release(program.release, -1)
            if not reads:
                self._at.send_releases()
            else:
                self._cursor = self._root
            return outcome
        if not self._pending:
            known = self._match(program)
            if known is not None:
                outcome = self._run(program, known, fetch, describe)
                self._cursor = self._root if reads else known
                return outcome
        self._pending.append(program)
        self._pending_ops += len(program.entries)
        late = self._pending_ops > MAX_WINDOW or self._at.host_bytes > MAX_HELD_BYTES
        if reads or late or program.fresh:
            outcome = self._run_pending(fetch, describe)
            if reads:
                self._cursor = self._root
            return outcome
        return Outcome()

    def _match(self, program: Program) -> _Known | None:
        found = self._cursor.next.get(self._key(program))
        if found is not None:
            for known in found:
                if known.fits(program):
                    return known
        return None

    def _key(self, program: Program) -> tuple:
        return (program.key, tuple(map(self._at.where.get, program.ext)))

    def _run_pending(self, fetch: list[int], describe: Sequence[int] = ()) -> Outcome:
        """Plans what is pending as one window, and runs it; the last program's outcome."""
        programs, self._pending, self._pending_ops = self._pending, [], 0
        fresh = any(p.fresh for p in programs)
        plans = self._plan(programs, fetch)
        outcome = Outcome()
        for program, known in zip(programs, plans, strict=True):
            # By where things are now: as they will be when the program comes again.
            key = self._key(program)
            last = program is programs[-1]
            outcome = self._run(program, known, fetch if last else [], list(describe) if last else [])
            if not last:
                for r in outcome.relayouts:
                    program.entries[r.instruction].correct(r.output, r.stride)
            if not fresh:
                self._learn(key, known)
        if fresh:
            # Planned without knowing whether the predicted layouts are true: planned anew the next time.
            self._cursor = _Known()
        return outcome

    def _learn(self, key: tuple, known: _Known) -> None:
        if self._known >= MAX_KNOWN:
            self._root, self._known = _Known(), 0
            self._cursor = self._root
        self._cursor.next.setdefault(key, []).insert(0, known)
        self._known += 1
        self._cursor = known

    # -- planning ------------------------------------------------------------------------------------

    def _plan(self, programs: list[Program], fetch: Sequence[int]) -> list[_Known]:
        started = time.perf_counter()
        if self._home < 0:
            self._home = self._choose_home()
        window = merge(programs)
        problem = self._problem(window, fetch, not any(p.fresh for p in programs))
        plan = schedule(problem, self.policies)
        known = self._known_of(window, problem, plan)
        seconds = time.perf_counter() - started
        self.plan_s += seconds
        self.planned += 1
        self.explained.append(Explained(problem, plan, seconds))
        return known

    def _problem(self, window: Window, fetch: Sequence[int], may_split: bool) -> Problem:
        at, program = self._at, window.program
        written = _written_externals(program)
        for k in written:
            self._reduce(program.ext[k])
        specs = [
            to_wire(s) if s is not None else wire_spec(at.host[h])
            for h, s in zip(program.ext, window.specs, strict=True)
        ]
        graph = graph_of(program, specs, program.ext, self._parameters, fetch)
        where = {-k - 1: self._as_device(at.place(h)) for k, h in enumerate(program.ext)}
        alias = {-k - 1: at.alias[h] for k, h in enumerate(program.ext) if h in at.alias}
        movable = frozenset(-k - 1 for k, h in enumerate(program.ext) if h not in at.alias)
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

    def _reduce(self, handle: int) -> None:
        """A value that is about to be written to has no copies: they would be left behind."""
        at = self._at
        group = at.alias.get(handle)
        members = [handle] if group is None else [h for h, g in at.alias.items() if g == group]
        for h in members:
            place = at.place(h)
            if len(place.servers) > 1:
                at.keep_only(h, at.origin.get(h, place.servers[0]))

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

    def _known_of(self, window: Window, problem: Problem, plan: Plan) -> list[_Known]:
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
                known.append(_Known(server, plan=begun))
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
            sizes = list(_sizes(program))
            known.append(_Known(own[0][0], slices, sizes, begun))
        return known

    # -- running -------------------------------------------------------------------------------------

    def _run(self, program: Program, known: _Known, fetch: list[int], describe: list[int]) -> Outcome:
        self.turn += 1
        if known.plan is not None:
            self.followed.append(known.plan)
            if not self._lost:
                for s, seconds in enumerate(known.plan.busy_s):
                    self._busy[s] += seconds
        if known.slices is not None:
            self._run_slices(program, known.slices)
            return self._read(fetch, describe) if fetch or describe else Outcome()
        return self._run_whole(program, known, fetch, describe)

    def _run_whole(self, program: Program, known: _Known, fetch: list[int], describe: list[int]) -> Outcome:
        at, s = self._at, known.server
        if s in self._lost:
            raise self._lost[s]
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
        releases = at.release(program.release, s) if program.release else []
        request = link.message(
            program,
            releases,
            inputs=wire,
            fetch=fetch if whole else [],
            describe=describe,
            quiet=not ((fetch and whole) or describe or program.fresh),
            release=at.take_dead(s),
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

    def _bind_results(self, program: Program, s: int) -> None:
        static = self._static.get(program.key)
        if static is None:
            if len(self._static) >= MAX_KNOWN:
                self._static.clear()
            static = self._static[program.key] = _Static.of(program)
        at, base, single = self._at, program.base, self._at.single[s]
        where = at.where
        for slot in static.kept:
            where[base + slot] = single
        if at.origin and static.written:
            for k in static.written:
                self._reduce_to(program.ext[k], s)
        for slot, root in static.views:
            of = program.ext[-root - 1] if root < 0 else base + root
            at.alias[base + slot] = at.alias.setdefault(of, of)

    def _reduce_to(self, handle: int, server: int) -> None:
        at = self._at
        group = at.alias.get(handle)
        members = [handle] if group is None else [h for h, g in at.alias.items() if g == group]
        for h in members:
            if len(at.place(h).servers) > 1:
                at.keep_only(h, server)

    def _specs(self, program: Program, handles: Sequence[int]) -> Callable[[], list[TensorSpec | None]]:
        def specs() -> list[TensorSpec | None]:
            found = merge([program])
            by_handle = dict(zip(found.program.ext, found.specs, strict=True))
            return [None if (s := by_handle.get(h)) is None else to_wire(s) for h in handles]

        return specs

    def _run_slices(self, program: Program, slices: Slices) -> None:
        at = self._at
        at.ensure(program.ext, slices.needs, self._specs(program, program.ext))
        parts: dict[tuple[int, int], int] = {}
        gathered: dict[int, int] = {}
        temporary: list[tuple[int, int]] = []
        first = True
        for step in slices.steps:
            if isinstance(step, Run):
                if step.server in self._lost:
                    raise self._lost[step.server]
                run = step.bind(program, gathered, checked=bool(program.fresh))
                run.first = self._part_number(program.first, step.numbers)
                run.trace, program.trace = (program.trace if first else None), None
                first = False
                self._send_run(run, step.server)
            elif isinstance(step, Move):
                at.move(step, program.base, parts)
                if step.gather is not None:
                    temporary.append((step.target, parts[step.gather, step.part]))
            else:
                assert isinstance(step, Gather)
                name = gathered[step.number] = at.gather(step, program.base, parts)
                temporary.append((step.server, name))
        for server, name in temporary:
            at.dead[server].append(name)
        for server, slots in slices.leftover.items():
            at.dead[server] += [program.base + slot for slot in slots]
        for slot, place in slices.kept:
            h = program.base + slot
            at.where[h] = at.number(place)
            if len(place.servers) > 1:
                at.origin[h] = place.servers[0]
        at.release(program.release, -1)
        self.links[
            slices.steps[0].server if isinstance(slices.steps[0], Run) else 0
        ].timings.capture += program.capture_s

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
        if len(self._parts) > 512:
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
        for s, handles in wanted.items():
            link = self.links[s]
            request = link.message(empty, fetch=handles, describe=asked.get(s, []), release=at.take_dead(s))
            link.send(request, [])
        got: dict[tuple[int, int], Tensor] = {}
        described: dict[int, TensorSpec] = {}
        failures: list[GenieError] = []
        for s, handles in wanted.items():
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
                fetched.append(torch.cat([got[h, s] for s in pieces[h]], axis.dim))
        return Outcome(fetched, [described[h] for h in describe])

    def _receive(self, link: ServerLink) -> tuple[Result, Tensor]:
        try:
            return link.receive()
        except ServerLostError as exc:
            self._lose(link, exc)
            raise
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
        """The error behind ``exc``: a transfer fails when the program that should have made the value did."""
        for link in self.links:
            if not link.connection.alive:
                self._lose(link, exc)
        if not isinstance(exc, PeerError):
            return exc
        for s, link in enumerate(self.links):
            if s in self._lost:
                continue
            try:
                link.settle()
            except ServerLostError as lost:
                self._lose(link, lost)
                return lost
            except PeerError:
                continue
            except GenieError as cause:
                self._number(cause)
                return cause
        return exc

    # -- members -------------------------------------------------------------------------------------

    def _lose(self, link: ServerLink, exc: GenieError) -> None:
        """What only that server had is gone; the others go on."""
        s = self.links.index(link)
        if s in self._lost:
            return
        self._lost[s] = exc
        self._peers.dissolve()
        self._root, self._known = _Known(), 0
        self._cursor = self._root
        self._at.lose(s)
        if self._home == s:
            self._home = -1

    def add(self, link: ServerLink, cost: CostModel | None = None, client: Link | None = None) -> None:
        """One more server, from the next window that is planned on."""
        self.links = (*self.links, link)
        self._at.grow(link)
        self._busy.append(0.0)
        self._costs.append(cost if cost is not None else NominalCost())
        if client is not None:
            self._client_links.append(client)
        self._peers.dissolve()
        self._root, self._known = _Known(), 0
        self._cursor = self._root

    def close(self) -> None:
        self._pending = []
        for link in self.links:
            link.close()


@dataclass(frozen=True)
class _Static:
    """What a template does to the places of its values: slots kept, views kept with what they are views
    of, externals written to."""

    kept: tuple[int, ...]
    views: tuple[tuple[int, int], ...]
    written: tuple[int, ...]

    @classmethod
    def of(cls, program: Program) -> _Static:
        roots: dict[int, int] = {}
        for instruction, entry in zip(instructions(program.key[0]), program.entries, strict=True):
            if entry.views and instruction.reads.new:
                root = roots.get(instruction.slots[0], instruction.slots[0])
                for k in range(instruction.reads.new):
                    roots[instruction.first_new + k] = root
        kept = tuple(h - program.base for h in program.kept_handles())
        return cls(kept, tuple((s, roots[s]) for s in kept if s in roots), _written_externals(program))


def _written_externals(program: Program) -> tuple[int, ...]:
    """Numbers of the externals whose memory the program writes to."""
    roots: dict[int, int] = {}
    written: set[int] = set()
    for instruction, entry in zip(instructions(program.key[0]), program.entries, strict=True):
        if entry.views and instruction.reads.new:
            root = roots.get(instruction.slots[0], instruction.slots[0])
            for k in range(instruction.reads.new):
                roots[instruction.first_new + k] = root
        if entry.writes:
            places = instruction.reads.written or range(len(instruction.slots))
            for place in places:
                root = roots.get(instruction.slots[place], instruction.slots[place])
                if root < 0:
                    written.add(-root - 1)
    return tuple(sorted(written))


def _first(failures: list[GenieError]) -> GenieError:
    """The one to tell: no mere consequence of another, and the earliest."""

    def rank(exc: GenieError) -> tuple[bool, int]:
        n = getattr(exc, "instruction", -1)
        return isinstance(exc, PeerError), n if n >= 0 else 1 << 62

    return min(failures, key=rank)
