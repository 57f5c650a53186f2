"""Programs go to the servers as they were planned, and what is read comes back from them."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from genie.errors import GenieError, PeerError, RemoteError, ServerLostError
from genie.frontend.program import Outcome, Program
from genie.frontend.specs import to_wire
from genie.runtime.connection import fetched_tensors
from genie.runtime.failures import PartNumbers, first_cause
from genie.runtime.known import MAX_KNOWN, Effects, Known
from genie.runtime.layout import joined
from genie.runtime.link import ServerLink, inline_inputs
from genie.runtime.members import Members
from genie.runtime.placement import Placement
from genie.runtime.steps import Move, Narrow, Need, Run, Slices
from genie.runtime.transport import Transport
from genie.runtime.window import Memory, instructions, merge
from genie.scheduler.plan import Plan
from genie.wire.messages import Result, TensorSpec

INLINE_BYTES = 64 << 10


class Dispatcher:
    """Keeps the account ``at`` of what each program makes, moves and frees. ``turn``: programs run so far,
    for policies that take turns; ``followed``: the plans of the windows that ran last."""

    def __init__(self, members: Members, at: Placement, transport: Transport) -> None:
        self.turn = 0
        self.followed: deque[Plan] = deque(maxlen=1024)
        self.last_server = 0
        self._members = members
        self._at = at
        self._transport = transport
        self._parts = PartNumbers()
        self._effects: dict[tuple[bytes, bytes], Effects] = {}

    def run(self, program: Program, known: Known, fetch: list[int], describe: list[int]) -> Outcome:
        """Sends the program out as ``known`` says, and reads. Raises what the servers tell, some time later,
        of any program before: see `root_cause`."""
        self.turn += 1
        if known.plan is not None:
            self.followed.append(known.plan)
            if not self._members.lost:
                for s, seconds in enumerate(known.plan.busy_s):
                    self._members.busy[s] += seconds
        if known.slices is not None:
            self._run_slices(program, known, known.slices)
            return self.read(fetch, describe) if fetch or describe else Outcome()
        return self._run_whole(program, known, fetch, describe)

    def _run_whole(self, program: Program, known: Known, fetch: list[int], describe: list[int]) -> Outcome:
        at, s = self._at, known.server
        if s in self._members.lost:
            raise copy.copy(self._members.lost[s])
        link, where, single = self._members.links[s], at.where, at.single[s]
        inputs: list[tuple[int, Tensor]] = []
        elsewhere: list[int] = []
        for h in program.ext:
            n = where.get(h)
            if n != single:
                if n == 0 and at.host[h].nbytes <= INLINE_BYTES:
                    inputs.append((h, at.host[h]))
                    at.leave_host(h, (s,))
                elif n is None or s not in at.places[n].servers:
                    elsewhere.append(h)
        if elsewhere:
            self._transport.ensure(elsewhere, [Need((s,))] * len(elsewhere), self._specs(program, elsewhere))
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
            return self.read(fetch, describe) if fetch else Outcome()
        result, payload = self._receive(link)
        self._members.busy[s] = 0.0
        outcome = Outcome([], result.described, result.relayouts, result.receipt)
        if fetch:
            outcome.fetched = fetched_tensors(result, payload) if whole else self.read(fetch, []).fetched
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

    def effects_of(self, program: Program) -> Effects:
        effects = self._effects.get(program.key)
        if effects is None:
            if len(self._effects) >= MAX_KNOWN:
                self._effects.clear()
            effects = self._effects[program.key] = Effects.of(program)
        return effects

    def _bind_results(self, program: Program, s: int) -> None:
        effects = self._effects.get(program.key) or self.effects_of(program)
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

        effects = self.effects_of(program)
        if known.unmet is None:
            known.unmet = self._transport.unmet(ext, slices.needs)
        self._transport.ensure(ext, slices.needs, self._specs(program, ext), known.unmet)
        self._hold(program, slices.homes, effects)
        parts: dict[tuple[int, int], int] = {}
        temporary: dict[int, int] = {}
        self._members.links[self._members.alive[0]].timings.capture += program.capture_s
        for step in slices.steps:
            if isinstance(step, Run):
                if step.server in self._members.lost:
                    raise copy.copy(self._members.lost[step.server])
                run = step.bind(program, temporary, checked=bool(program.fresh))
                run.first = self._parts.number(program.first, step.numbers)
                run.trace, program.trace = program.trace, None
                self._send_run(run, step.server)
                at.dead[step.server] += [temporary[number] for number in step.done]
            elif isinstance(step, Move):
                name = self._transport.move(step, name_of)
                if step.temporary is not None:
                    parts[step.temporary, step.part] = temporary[step.temporary] = name
            elif isinstance(step, Narrow):
                temporary[step.number] = self._transport.narrow(step, name_of)
            else:
                temporary[step.number] = self._transport.gather(step, name_of, parts)
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
        link = self._members.links[server]
        request = link.message(run, run.release, quiet=not run.fresh, release=self._at.take_dead(server))
        link.send(request, [])
        if run.fresh:
            result, _ = self._receive(link)
            for r in result.relayouts:
                run.entries[r.instruction].correct(r.output, r.stride)

    # -- reading -------------------------------------------------------------------------------------

    def read(self, fetch: list[int], describe: Sequence[int]) -> Outcome:
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
            link = self._members.links[s]
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
                result, payload = self._receive(self._members.links[s])
            except GenieError as exc:
                failures.append(exc)
                continue
            self._members.busy[s] = 0.0
            got.update({(h, s): t for h, t in zip(handles, fetched_tensors(result, payload), strict=True)})
            described.update(zip(asked.get(s, []), result.described, strict=True))
        if failures:
            raise first_cause(failures)
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
            self._parts.trace(exc)
            raise

    def root_cause(self, exc: GenieError) -> GenieError:
        """The error behind ``exc``: what a server waited for failed elsewhere. No server is left with an
        error that it has not told, which a later read would take for its own."""
        lost = self._members.lose_dead(exc)
        if not isinstance(exc, RemoteError):
            return lost or exc
        failures: list[GenieError] = [exc]
        for s, link in enumerate(self._members.links):
            if s in self._members.lost:
                continue
            try:
                link.settle()
            except ServerLostError as gone:
                lost = self._members.lose_dead(gone) or lost
            except RemoteError as cause:
                self._parts.trace(cause)
                failures.append(cause)
        first = first_cause(failures)
        if isinstance(first, PeerError) and self._members.lost:
            lost = lost or copy.copy(next(reversed(self._members.lost.values())))
        return lost if lost is not None and isinstance(first, PeerError | ServerLostError) else first
