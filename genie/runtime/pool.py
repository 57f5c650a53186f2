"""An executor over a pool of servers: plans each window once, then follows the plan.

Programs are collected until something is read; such a window is merged into one graph, annotated and
planned (`genie.runtime.planning`). What was planned is remembered by the programs' templates and by where
their inputs are, so that a window met again is not even collected: each program goes out as it is recorded
(`genie.runtime.dispatch`).
What is remembered decides only *where* things run. What must move for that is found anew each time from
where the values really are, so a window that goes on otherwise than the one before is still right.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor

from genie.errors import GenieError, ServerLostError
from genie.frontend.program import Outcome, Program
from genie.runtime.dispatch import INLINE_BYTES, Dispatcher
from genie.runtime.graphs import hints_of
from genie.runtime.known import Known, KnownWindows
from genie.runtime.link import ServerLink
from genie.runtime.members import Members
from genie.runtime.peers import TIMEOUT_S, PeerGroup
from genie.runtime.placement import Placement, Uploaded, wire_spec
from genie.runtime.planning import Explained, Planner
from genie.runtime.transport import Transport
from genie.scheduler.cluster import CostModel, Link
from genie.scheduler.plan import Plan
from genie.scheduler.problem import Policy

CHUNK = 128
#: a window is planned at the latest when it has this many instructions, or holds so many bytes of inputs
MAX_WINDOW = 16_384
MAX_HELD_BYTES = 256 << 20


class PoolExecutor:
    """Programs run on ``links`` as ``policies`` decide. ``costs`` and ``client_links``: a model of each
    server and the link to it; without them the scheduler knows nominal rates only. ``peer``: what is between
    two servers, None where they cannot reach each other."""

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
        peers = PeerGroup(peer_timeout_s)
        self._at = Placement(links)
        self.members = Members(links, self._at, peers, costs=costs, client_links=client_links, peer=peer)
        self._parameters: set[int] = set()
        self._planner = Planner(policies, self.members, self._at, self._parameters)
        self._dispatcher = Dispatcher(self.members, self._at, Transport(self._at, peers))
        self._pending: list[Program] = []
        self._pending_ops = 0
        self._running: list[Program] = []  # of the present window, not done with
        self._known = KnownWindows()

    @property
    def links(self) -> tuple[ServerLink, ...]:
        """All servers that ever were in the pool, the lost ones too."""
        return self.members.links

    @property
    def policies(self) -> list[Policy]:
        """Those of the next window that is planned; may be changed."""
        return self._planner.policies

    @property
    def plan_s(self) -> float:
        """Seconds that annotation and planning took so far."""
        return self._planner.plan_s

    @property
    def planned(self) -> int:
        """How many windows were planned so far."""
        return self._planner.planned

    @property
    def explained(self) -> deque[Explained]:
        """The windows that were planned last."""
        return self._planner.explained

    @property
    def followed(self) -> deque[Plan]:
        """The plans of the windows that ran last."""
        return self._dispatcher.followed

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
                server = self.members.server_for(tensor)
                digest = self.links[server].upload(handle, tensor, is_parameter)
                break
            except ServerLostError as exc:
                # Only what it had is lost: this value was not there yet.
                if not self.members.lose_dead(exc):
                    raise
                self._known.forget()
        at.held[server] += tensor.nbytes
        at.bind((handle,), at.single[server])
        if is_parameter:
            at.uploaded[handle] = Uploaded(wire_spec(tensor), digest)
            self._parameters.add(handle)

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
            alive = len(self.alive)
            cause = self._dispatcher.root_cause(exc)
            if len(self.alive) < alive:
                self._known.forget()
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
            outcome = self._dispatcher.read(fetch, describe) if reads else Outcome()
            self._at.release(program.release, -1)
            if not reads:
                self._at.send_releases()
            else:
                self._known.begin()
            return outcome
        if not self._pending:
            known = self._match(program)
            if known is not None:
                outcome = self._dispatcher.run(program, known, fetch, describe)
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
            homes = [(k, (known.server,)) for k in self._dispatcher.effects_of(program).held]
        return all(len(servers) > 1 or at.may_be_home(program.ext[k], servers[0]) for k, servers in homes)

    def _key(self, program: Program) -> tuple:
        return (program.key, tuple(map(self._at.where.get, program.ext)), hints_of(program))

    def _run_pending(self, fetch: list[int], describe: Sequence[int] = ()) -> Outcome:
        """Plans what is pending as one window, and runs it; the last program's outcome."""
        programs, self._pending, self._pending_ops = self._pending, [], 0
        fresh = any(p.fresh for p in programs)
        plans = self._planner.plan(programs, fetch, self._dispatcher.turn)
        plans[-1].ends = not (fetch or describe)
        outcome = Outcome()
        for program, known in zip(programs, plans, strict=True):
            # By where its inputs are now, as they will be when the program comes again; but what was uploaded
            # long ago (parameters, buffers) stays where this run takes it.
            before = [self._at.where.get(h) for h in program.ext]
            last = program is programs[-1]
            reads = (fetch, list(describe)) if last else ([], [])
            outcome = self._dispatcher.run(program, known, *reads)
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

    # -- members -------------------------------------------------------------------------------------

    @property
    def alive(self) -> list[int]:
        """The servers that are not lost, by their places among ``links``."""
        return self.members.alive

    def add(self, link: ServerLink, cost: CostModel | None = None, client: Link | None = None) -> None:
        """One more server, from the next window that is planned on. ``cost`` and ``client`` (the link to it)
        are needed where the pool has such of the others, and refused where it has not: ConfigError."""
        self.members.add(link, cost, client)
        self._known.forget()

    def close(self) -> None:
        self._pending = []
        for link in self.links:
            link.close()
