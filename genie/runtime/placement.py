"""Where each handle of a session is, over a pool of servers, and moving them: `Placement`.

Handles are the same number on every server. What the client uploads stays with the client until a
program needs it somewhere; values move between servers by `Send` and `Expect`, never through the client.
"""

from __future__ import annotations

import copy
from array import array
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor

from genie.errors import GenieError, PlanError, ServerLostError
from genie.frontend.entries import define
from genie.frontend.program import Program
from genie.frontend.specs import spec_of
from genie.frontend.specs import to_wire as spec_to_wire
from genie.runtime.layout import dense_stride, inverse, nbytes, order_of
from genie.runtime.link import ServerLink, int64s
from genie.runtime.peers import PeerGroup
from genie.runtime.steps import Gather, Move, Narrow, Need
from genie.scheduler.batch_axis import part_spec
from genie.scheduler.where import CLIENT, Axis, Shard, Where
from genie.wire.messages import Adopt, Expect, Offer, Release, Send, TensorSpec, Wanted

#: handles that the client makes up for parts of values; far beyond those of any program
_TEMPORARY = 1 << 60
_CAT = define("aten::cat.default", [["tl", 2], ["i"]], {}, [-1])
#: the number of instructions that no Python line recorded; see `genie.runtime.pool`
UNNUMBERED = 1 << 40
#: binds the one kept slot of a program to the handle of its base, whichever slot it is
_FIRST_NAME = array("i", [0]).tobytes()
_SLICE = define("aten::slice.Tensor", [["t"], ["i"], ["i"], ["i"], ["i"]], {}, [-1])


@dataclass(frozen=True)
class Uploaded:
    """What the client knows of a parameter that it sent: geometry, and digest where servers share it."""

    spec: TensorSpec
    digest: bytes | None


class Placement:
    """The places of a session's values. ``where`` maps a handle to the number of a `Where` in ``places``;
    equal places have equal numbers, 0 is the client. Not thread-safe."""

    def __init__(self, links: Sequence[ServerLink], peers: PeerGroup) -> None:
        self.links = list(links)
        self._peers = peers
        self.places: list[Where] = [CLIENT]
        self._numbers: dict[Where, int] = {CLIENT: 0}
        self.where: dict[int, int] = {}
        self.host: dict[int, Tensor] = {}
        self.host_bytes = 0
        self.uploaded: dict[int, Uploaded] = {}
        self.held = [0] * len(self.links)
        #: of a value with copies: the server where its memory is. Writes and views that stay happen there
        self.origin: dict[int, int] = {}
        #: live handles that share memory have one number here; absent: none does
        self.alias: dict[int, int] = {}
        self._members: dict[int, set[int]] = {}
        #: groups of those that were divided or joined, each handle for itself: they share memory no more
        self._parted: set[int] = set()
        #: handles whose values are no longer laid out as the client thinks: what moves becomes dense
        self.restrided: set[int] = set()
        #: why a handle has no value
        self.failed: dict[int, GenieError] = {}
        self.dead: list[list[int]] = [[] for _ in self.links]
        self._tags = self._temporaries = 0
        self.lost: set[int] = set()
        self.single = [self.number(Where(servers=(s,))) for s in range(len(self.links))]

    def number(self, place: Where) -> int:
        n = self._numbers.get(place)
        if n is None:
            n = self._numbers[place] = len(self.places)
            self.places.append(place)
        return n

    def place(self, handle: int) -> Where:
        """Raises what kept the value from being made, or took it away; PlanError for an unknown handle."""
        n = self.where.get(handle)
        if n is None:
            if handle in self.failed:
                raise copy.copy(self.failed[handle])
            raise PlanError(f"handle {handle} is on no server: it was released already")
        return self.places[n]

    def fail(self, handles: Iterable[int], error: GenieError) -> None:
        """Handles that a program did not make: their use raises a copy of ``error``."""
        error = copy.copy(error)
        for h in handles:
            if h not in self.where:
                self.failed[h] = error

    def lose(self, server: int) -> None:
        """What only this server had, wholly or some rows of it, is gone; so are values that shared memory
        there, even if there are copies: those would no longer change together."""
        self.lost.add(server)
        self.dead[server].clear()
        gone: list[int] = []
        for h, n in list(self.where.items()):
            place = self.places[n]
            if server not in self._servers_of(place):
                continue
            left = tuple(s for s in place.servers if s != server)
            shared = h in self.alias and self.origin.get(h, server) == server
            if left and not shared:
                self.where[h] = self.number(Where(left))
                if len(left) == 1 or self.origin.get(h) == server:
                    self.origin.pop(h, None)
            else:
                for s in left:
                    self.dead[s].append(h)
                gone.append(h)
                del self.where[h]
        self.fail(
            gone,
            ServerLostError(
                f"a value was only on server {server}, which is lost: make it anew (parameters: load the "
                "model again), or open a new session"
            ),
        )

    def grow(self, link: ServerLink) -> None:
        """One more server."""
        self.links.append(link)
        self.held.append(0)
        self.dead.append([])
        self.single.append(self.number(Where(servers=(len(self.links) - 1,))))

    # -- coming and going ----------------------------------------------------------------------------

    def keep_on_host(self, handle: int, tensor: Tensor) -> None:
        """``tensor`` must not change any more."""
        self.where[handle] = 0
        self.host[handle] = tensor
        self.host_bytes += tensor.nbytes

    def bind(self, handles: Iterable[int], number: int) -> None:
        where = self.where
        for h in handles:
            where[h] = number

    def release(self, handles: list[int], server: int) -> list[int]:
        """Forgets the handles; returns those that are only on ``server``, and sees to the others itself."""
        where, single, here = self.where, self.single[server] if server >= 0 else -1, []
        for h in handles:
            n = where.pop(h, None)
            if n == single:
                here.append(h)
            elif n == 0:
                self.host_bytes -= self.host.pop(h).nbytes
            elif n is not None:
                for s in self._servers_of(self.places[n]):
                    self.dead[s].append(h)
            elif self.failed:
                self.failed.pop(h, None)
        if self.restrided:
            self.restrided.difference_update(handles)
        if self.uploaded or self.origin or self.alias:
            for h in handles:
                self.uploaded.pop(h, None)
                self.origin.pop(h, None)
                if h in self.alias:
                    self._leave_group(h)
        return here

    def _servers_of(self, place: Where) -> tuple[int, ...]:
        return place.servers or tuple(s.server for s in place.shards)

    def send_releases(self) -> None:
        """Tells idle servers of handles that died, so that none keeps them for long."""
        for link, dead in zip(self.links, self.dead, strict=True):
            if dead:
                link.connection.post(Release(list(dead)))
                dead.clear()

    def _keep_only(self, handle: int, server: int) -> None:
        """The copy on ``server`` is the value from now on."""
        for s in self.place(handle).servers:
            if s != server:
                self.dead[s].append(handle)
        self.where[handle] = self.single[server]
        self.origin.pop(handle, None)

    # -- shared memory -------------------------------------------------------------------------------

    def share(self, view: int, of: int) -> None:
        """``view`` shares memory with ``of``, whether that is alive or not."""
        group = self.alias.get(of)
        if group is None:
            group = of
            if of in self.where:
                self._members.setdefault(group, set()).add(of)
                self.alias[of] = group
        self._members.setdefault(group, set()).add(view)
        self.alias[view] = group

    def _leave_group(self, handle: int) -> None:
        group = self.alias.pop(handle)
        members = self._members[group]
        members.discard(handle)
        if not members:
            del self._members[group]
            self._parted.discard(group)

    def sharing(self, handle: int) -> Collection[int]:
        """The live handles that share memory with this one, itself included."""
        group = self.alias.get(handle)
        return (handle,) if group is None else self._members[group]

    def home(self, handle: int) -> int | None:
        """The server that has the memory of a whole value; None while that is open."""
        for h in self.sharing(handle):
            servers = self.places[self.where.get(h, 0)].servers
            if servers:
                return self.origin.get(h, servers[0])
        return None

    def may_be_home(self, handle: int, server: int) -> bool:
        """Whether ``server`` may write to the value, or make a view of it that stays."""
        return len(self.sharing(handle)) == 1 or self.home(handle) in (None, server)

    def write(self, handle: int, server: int) -> None:
        """The value is about to be written to on ``server``, which has it: its copies die, and those of what
        shares its memory. Raises PlanError where that memory is no longer one."""
        members = self.sharing(handle)
        parted = len(members) > 1 and self.alias[handle] in self._parted
        if parted or not self.may_be_home(handle, server):
            raise PlanError(
                "a value is written to that shares memory with another, but they were moved apart between "
                "servers: write to a .clone() of it, or keep only one of them"
            )
        for h in members:
            self.uploaded.pop(h, None)
            if len(self.place(h).servers) > 1:
                self._keep_only(h, server)

    def settle_home(self, handle: int, server: int) -> None:
        """The memory of the value is on ``server`` from now on, which has a copy."""
        if handle in self.origin:
            self.origin[handle] = server

    def _part(self, handle: int) -> None:
        group = self.alias.get(handle)
        if group is not None and len(self._members[group]) > 1:
            self._parted.add(group)

    # -- moving --------------------------------------------------------------------------------------

    def unmet(self, handles: Sequence[int], needs: Sequence[Need]) -> list[int]:
        """Which of the values (by place) are not where they are needed. Raises the error of one that could
        not be made, before anything moves."""
        found = []
        for k, (h, need) in enumerate(zip(handles, needs, strict=True)):
            if not need.servers and need.sharded is None:
                continue
            place = self.place(h)
            if place == need.sharded:
                continue
            if need.sharded is None and place.servers and set(need.servers) <= set(place.servers):
                continue
            found.append(k)
        return found

    def ensure(
        self,
        handles: Sequence[int],
        needs: Sequence[Need],
        specs: Callable[[], Sequence],
        unmet: Sequence[int] | None = None,
    ) -> None:
        """Moves what is not yet where a program needs it. ``specs()``: a TensorSpec for each handle.
        ``unmet``: what `unmet` returns, where that is known already."""
        wanted: dict[tuple[int, int], list[int]] = {}
        known: Sequence | None = None
        for k in self.unmet(handles, needs) if unmet is None else unmet:
            h, need = handles[k], needs[k]
            place = self.place(h)
            if place.on_client:
                if need.sharded is not None:
                    self._shard(h, place, need.sharded, wire_spec(self.host[h]))
                    continue
                for s in need.servers:
                    self._from_host(h, s)
                self._leave_host(h, need.servers)
                continue
            if known is None:
                known = specs()
            spec = known[k]
            if spec is None:
                raise PlanError("the plan moves a value whose shape only its server knows")
            if need.sharded is not None:
                self._shard(h, place, need.sharded, spec)
                continue
            if place.shards:
                self._gather_whole(h, place, need.servers[0], spec)
                place = self.place(h)
            for s in need.servers:
                if s not in place.servers:
                    wanted.setdefault((self.origin.get(h, place.servers[0]), s), []).append(k)
        for (source, target), places in wanted.items():
            assert known is not None
            self._copy([handles[k] for k in places], [known[k] for k in places], source, target)

    def _from_host(self, h: int, s: int) -> None:
        tensor = self.host[h]
        self.held[s] += tensor.nbytes
        self._revive(s, h)
        self.links[s].upload(h, tensor, False)

    def _leave_host(self, h: int, servers: tuple[int, ...]) -> None:
        self.where[h] = self.number(Where(servers=servers))
        if len(servers) > 1:
            self.origin[h] = servers[0]
        self.host_bytes -= self.host.pop(h).nbytes

    def left_host(self, h: int, server: int) -> None:
        """The value travelled inside a program to ``server``."""
        self._leave_host(h, (server,))

    def _copy(self, handles: list[int], specs: list[TensorSpec], source: int, target: int) -> None:
        """Copies of whole values; what the target's store of shared contents has already is not sent."""
        digests = {h: u.digest for h in handles if (u := self.uploaded.get(h)) is not None and u.digest}
        missing = set(digests)
        link = self.links[target]
        if digests:
            offered = list(digests)
            sizes = [nbytes(self.uploaded[h].spec) for h in offered]
            wanted, _ = link.connection.request(Offer([digests[h] or b"" for h in offered], sizes))
            assert isinstance(wanted, Wanted)
            missing = {offered[i] for i in wanted.missing}
        for h, spec in zip(handles, specs, strict=True):
            digest = digests.get(h)
            if digest is not None:
                spec = self.uploaded[h].spec
            if digest is not None and h not in missing:
                self._revive(target, h)
                link.connection.post(Adopt(h, spec, digest))
            else:
                self.transfer(h, h, spec, source, target, digest=digest)
            self.held[target] += nbytes(spec)
            self.origin.setdefault(h, source)
            self.where[h] = self.number(Where(servers=tuple(sorted({*self.place(h).servers, target}))))

    def transfer(
        self,
        handle: int,
        name: int,
        spec: TensorSpec,
        source: int,
        target: int,
        *,
        narrow: tuple[int, int, int] | None = None,
        digest: bytes | None = None,
    ) -> None:
        """``handle`` on ``source`` becomes ``name`` on ``target``. Raises PeerError, ServerLostError."""
        if source == target:
            raise PlanError(f"a value was to move from server {source} to itself")
        self._peers.require([link for s, link in enumerate(self.links) if s not in self.lost])
        self._tags += 1
        plain = TensorSpec(spec.dtype, spec.shape, dense_stride(spec))
        if plain.stride != spec.stride:
            self.restrided.add(handle)
        self._revive(target, name)
        to, by = self.links[target], self.links[source]
        to.connection.post(Expect(name, plain, self._peers.rank(by), self._tags, digest))
        by.connection.post(Send(handle, plain, self._peers.rank(to), self._tags, narrow))

    def _revive(self, server: int, handle: int) -> None:
        """A handle that is bound anew must not be freed for what it was before."""
        dead = self.dead[server]
        if dead and handle in dead:
            dead.remove(handle)

    def _shard(self, h: int, place: Where, wanted: Where, spec: TensorSpec) -> None:
        """A whole value becomes one by rows."""
        if place.shards:
            self._gather_whole(h, place, wanted.shards[0].server, spec)
            place = self.place(h)
        self._part(h)
        self.restrided.add(h)
        axis, shards = wanted.axis, wanted.shards
        assert axis is not None
        size = shards[-1].stop
        if place.on_client:
            tensor = self.host[h]
            for shard in shards:
                part = tensor.narrow(axis.dim, shard.start * axis.inner, shard.rows * axis.inner)
                self.held[shard.server] += part.nbytes
                self._revive(shard.server, h)
                self.links[shard.server].upload(h, part.contiguous(), False)
            self.host_bytes -= self.host.pop(h).nbytes
        else:
            source = place.servers[0]
            for shard in shards:
                if shard.server not in place.servers:
                    rows = part_spec(spec, axis, shard.rows, size)
                    start, length = shard.start * axis.inner, shard.rows * axis.inner
                    self.transfer(h, h, rows, source, shard.server, narrow=(axis.dim, start, length))
            # Only now: the whole was needed for what was sent.
            for shard in shards:
                if shard.server in place.servers:
                    self._narrow_in_place(h, axis, shard)
            self.dead_but(h, place.servers, {shard.server for shard in shards})
        self.where[h] = self.number(wanted)
        self.origin.pop(h, None)
        self.uploaded.pop(h, None)

    def dead_but(self, h: int, servers: Sequence[int], needed: set[int]) -> None:
        """The handle's copies on ``servers`` die, but for those that are ``needed``."""
        for s in servers:
            if s not in needed:
                self.dead[s].append(h)

    def _narrow_in_place(self, h: int, axis: Axis, shard: Shard) -> None:
        """On a server that has the whole, the handle is bound to the rows that it needs."""
        literals = [axis.dim, shard.start * axis.inner, shard.stop * axis.inner, 1]
        self._run_one(shard.server, _SLICE, literals, [h], h)

    def _gather_whole(self, h: int, place: Where, target: int, spec: TensorSpec) -> None:
        """A value by rows becomes a whole one on ``target``."""
        assert place.axis is not None
        self._part(h)
        self.restrided.add(h)
        handles = []
        size = place.shards[-1].stop
        temporaries = []
        for shard in place.shards:
            if shard.server == target:
                handles.append(h)
                continue
            name = self.temporary()
            part = part_spec(spec, place.axis, shard.rows, size)
            self.transfer(h, name, part, shard.server, target)
            handles.append(name)
            temporaries.append(name)
            self.dead[shard.server].append(h)
        self._join(target, handles, place.axis.dim, order_of(spec), h)
        self.dead[target] += temporaries
        self.where[h] = self.single[target]

    def temporary(self) -> int:
        self._temporaries += 1
        return _TEMPORARY + self._temporaries

    def gather(self, step: Gather, name_of: Callable[[int], int], parts: dict[tuple[int, int], int]) -> int:
        """Joins the parts of a program's sharded value on one server; returns the handle of the whole.
        ``parts``: handles of what came, by (temporary's number, part)."""
        own = name_of(step.slot)
        handles = [own if k == step.own else parts[step.number, k] for k in range(step.parts)]
        name = self.temporary()
        self._join(step.server, handles, step.dim, step.order, name)
        self.dead[step.server] += [h for h in handles if h != own]
        return name

    def _join(self, server: int, handles: list[int], dim: int, order: Sequence[int], name: int) -> None:
        """Binds ``name`` to what the parts ``handles`` are together, laid out as they are."""
        n = len(order)
        if list(order) == list(range(n)):
            self._run_one(server, _cat(len(handles)), [dim], handles, name)
            return
        permute = define("aten::permute.default", [["t"], ["il", n]], {}, [-1])
        parts = range(len(handles))
        tids = [*(permute for _ in parts), _cat(len(handles)), permute]
        slots = [*([-k - 1] for k in parts), list(parts), [len(handles)]]
        literals = [*(d for _ in parts for d in order), order.index(dim), *inverse(order)]
        self._run_small(server, tids, slots, literals, handles, name)

    def narrow(self, step: Narrow, name_of: Callable[[int], int]) -> int:
        """Rows of a whole value that is on the server already; returns their handle."""
        name = self.temporary()
        self._run_one(step.server, _SLICE, [step.dim, step.start, step.stop, 1], [name_of(step.slot)], name)
        return name

    def move(self, step: Move, name_of: Callable[[int], int]) -> int:
        """Carries out a move of a program's value; returns its handle on the target."""
        handle = name_of(step.slot)
        name = handle if step.temporary is None else self.temporary()
        self.transfer(handle, name, step.spec, step.source, step.target, narrow=step.narrow)
        return name

    def _run_one(self, server: int, tid: int, literals: list[int], handles: list[int], name: int) -> None:
        self._run_small(server, [tid], [list(range(-1, -len(handles) - 1, -1))], literals, handles, name)

    def _run_small(
        self,
        server: int,
        tids: Sequence[int],
        slots: Sequence[Sequence[int]],
        literals: list[int],
        handles: list[int],
        name: int,
    ) -> None:
        """A program of instructions with one result each, the last of which is bound to ``name``."""
        code = array("i")
        for tid, own in zip(tids, slots, strict=True):
            code.append(tid)
            code.extend(own)
        program = Program(
            key=(code.tobytes(), array("i", [len(tids) - 1]).tobytes()),
            n_ext=len(handles),
            n_slots=len(tids),
            literals=literals,
            floats=[],
            ext=handles,
            base=name,
            names=_FIRST_NAME,
            inputs=[],
            release=[],
            entries=[_OneOp(tid) for tid in tids],  # type: ignore[misc]
            fresh=[],
            first=UNNUMBERED,
        )
        link = self.links[server]
        self._revive(server, name)
        link.send(link.message(program, release=self.take_dead(server), quiet=True), [])

    def take_dead(self, server: int) -> bytes:
        dead = self.dead[server]
        if not dead:
            return b""
        taken = int64s(dead)
        dead.clear()
        return taken

    # -- reading -------------------------------------------------------------------------------------

    def pieces(self, handle: int, prefer: int) -> list[int]:
        """The servers to read a value from: one that has it, or all that have rows of it, in order."""
        place = self.place(handle)
        if place.on_client:
            raise PlanError(f"handle {handle} is with the client: no server can describe it")
        if place.servers:
            return [prefer if prefer in place.servers else place.servers[0]]
        return [s.server for s in place.shards]


class _OneOp:
    """As much of an entry as a program of one instruction needs."""

    __slots__ = ("outs", "tid")

    def __init__(self, tid: int) -> None:
        self.tid = tid
        self.outs: list = []


def _cat(parts: int) -> int:
    return _CAT if parts == 2 else define("aten::cat.default", [["tl", parts], ["i"]], {}, [-1])


def wire_spec(tensor: Tensor) -> TensorSpec:
    return spec_to_wire(spec_of(tensor))
