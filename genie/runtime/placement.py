"""Where each handle of a session is, over a pool of servers, and moving them: `Placement`.

Handles are the same number on every server. What the client uploads stays with the client until a
program needs it somewhere; values move between servers by `Send` and `Expect`, never through the client.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from genie.errors import PlanError, ServerLostError
from genie.frontend.entries import define
from genie.frontend.program import Program
from genie.frontend.specs import spec_of
from genie.frontend.specs import to_wire as spec_to_wire
from genie.runtime.link import ServerLink, int64s
from genie.runtime.peers import PeerGroup
from genie.runtime.slicing import Gather, Move, Need
from genie.scheduler.batch_axis import part_spec
from genie.scheduler.where import CLIENT, Axis, Shard, Where
from genie.wire.messages import Adopt, Expect, Offer, Release, Send, TensorSpec, Wanted

#: handles that the client makes up for parts of values; far beyond those of any program
_TEMPORARY = 1 << 60
_CAT = define("aten::cat.default", [["tl", 2], ["i"]], {}, [-1])
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
        #: server where a value was made that has copies on others: what is written to must be written there
        self.origin: dict[int, int] = {}
        #: handles that share memory have one number here; absent: none does
        self.alias: dict[int, int] = {}
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
        """Raises ServerLostError for a value that only a lost server had."""
        n = self.where.get(handle)
        if n is None:
            if self.lost:
                raise ServerLostError(
                    f"a value was only on server {', '.join(map(str, sorted(self.lost)))}, which is lost: "
                    "open a new session, or make the value anew"
                )
            raise PlanError(f"handle {handle} is on no server: it was released already")
        return self.places[n]

    def lose(self, server: int) -> None:
        """What only this server had, wholly or some rows of it, is gone."""
        self.lost.add(server)
        self.dead[server].clear()
        for h, n in list(self.where.items()):
            place = self.places[n]
            if server in place.servers and len(place.servers) > 1:
                self.where[h] = self.number(Where(tuple(s for s in place.servers if s != server)))
                self.origin.pop(h, None)
            elif server in self._servers_of(place):
                del self.where[h]

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
        if self.uploaded or self.origin or self.alias:
            for h in handles:
                self.uploaded.pop(h, None)
                self.origin.pop(h, None)
                self.alias.pop(h, None)
        return here

    def _servers_of(self, place: Where) -> tuple[int, ...]:
        return place.servers or tuple(s.server for s in place.shards)

    def send_releases(self) -> None:
        """Tells idle servers of handles that died, so that none keeps them for long."""
        for link, dead in zip(self.links, self.dead, strict=True):
            if dead:
                link.connection.post(Release(list(dead)))
                dead.clear()

    def keep_only(self, handle: int, server: int) -> None:
        """The copy on ``server`` is the value from now on (it is about to be written to)."""
        for s in self.place(handle).servers:
            if s != server:
                self.dead[s].append(handle)
        self.where[handle] = self.single[server]
        self.origin.pop(handle, None)
        self.uploaded.pop(handle, None)

    # -- moving --------------------------------------------------------------------------------------

    def ensure(self, handles: Sequence[int], needs: Sequence[Need], specs: Callable[[], Sequence]) -> None:
        """Moves what is not yet where a program needs it. ``specs()``: a TensorSpec for each handle."""
        wanted: dict[tuple[int, int], list[int]] = {}
        known: Sequence | None = None
        for k, (h, need) in enumerate(zip(handles, needs, strict=True)):
            place = self.place(h)
            if place == need.sharded or (place.servers and set(need.servers) <= set(place.servers)):
                continue
            if not need.servers and need.sharded is None:
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
            if place.on_client:
                for s in need.servers:
                    self._from_host(h, s)
                self._leave_host(h, need.servers)
                continue
            for s in need.servers:
                if s not in place.servers:
                    wanted.setdefault((self.origin.get(h, place.servers[0]), s), []).append(k)
        for (source, target), places in wanted.items():
            assert known is not None
            self._copy([handles[k] for k in places], [known[k] for k in places], source, target)

    def _from_host(self, h: int, s: int) -> None:
        tensor = self.host[h]
        self.held[s] += tensor.nbytes
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
            sizes = [_nbytes(self.uploaded[h].spec) for h in offered]
            wanted, _ = link.connection.request(Offer([digests[h] or b"" for h in offered], sizes))
            assert isinstance(wanted, Wanted)
            missing = {offered[i] for i in wanted.missing}
        for h, spec in zip(handles, specs, strict=True):
            digest = digests.get(h)
            if digest is not None:
                spec = self.uploaded[h].spec
            if digest is not None and h not in missing:
                link.connection.post(Adopt(h, spec, digest))
            else:
                self.transfer(h, h, spec, source, target, digest=digest)
            self.held[target] += _nbytes(spec)
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
        plain = TensorSpec(spec.dtype, spec.shape, _dense_stride(spec))
        to, by = self.links[target], self.links[source]
        to.connection.post(Expect(name, plain, self._peers.rank(by), self._tags, digest))
        by.connection.post(Send(handle, plain, self._peers.rank(to), self._tags, narrow))

    def _shard(self, h: int, place: Where, wanted: Where, spec: TensorSpec) -> None:
        """A whole value becomes one by rows."""
        if place.shards:
            self._gather_whole(h, place, wanted.shards[0].server, spec)
            place = self.place(h)
        axis, shards = wanted.axis, wanted.shards
        assert axis is not None
        size = shards[-1].stop
        if place.on_client:
            tensor = self.host[h]
            for shard in shards:
                part = tensor.narrow(axis.dim, shard.start * axis.inner, shard.rows * axis.inner)
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
        self._run_one(target, _cat(len(handles)), [place.axis.dim], handles, h)
        self.dead[target] += temporaries
        self.where[h] = self.single[target]

    def temporary(self) -> int:
        self._temporaries += 1
        return _TEMPORARY + self._temporaries

    def gather(self, step: Gather, base: int, parts: dict[tuple[int, int], int]) -> int:
        """Joins the parts of a program's sharded value on one server; returns the handle of the whole.
        ``parts``: handles of what came, by (temporary's number, part)."""
        handles = [base + step.slot if k == step.own else parts[step.number, k] for k in range(step.parts)]
        name = self.temporary()
        self._run_one(step.server, _cat(step.parts), [step.dim], handles, name)
        return name

    def move(self, step: Move, base: int, parts: dict[tuple[int, int], int]) -> None:
        """Carries out a move of a program's value; parts of gathered values get handles of their own."""
        name = base + step.slot
        if step.gather is not None:
            name = parts[step.gather, step.part] = self.temporary()
        self.transfer(base + step.slot, name, step.spec, step.source, step.target)

    def _run_one(self, server: int, tid: int, literals: list[int], handles: list[int], name: int) -> None:
        """A program of one instruction, whose result is bound to ``name``."""
        code = array("i", [tid, *range(-1, -len(handles) - 1, -1)])
        program = Program(
            key=(code.tobytes(), array("i", [0]).tobytes()),
            n_ext=len(handles),
            n_slots=1,
            literals=literals,
            floats=[],
            ext=handles,
            base=name,
            inputs=[],
            release=[],
            entries=[_OneOp(tid)],  # type: ignore[list-item]
            fresh=[],
        )
        link = self.links[server]
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


def _nbytes(spec: TensorSpec) -> int:
    n = getattr(torch, spec.dtype).itemsize
    for size in spec.shape:
        n *= size
    return n


def _dense_stride(spec: TensorSpec) -> list[int]:
    """Strides of a dense tensor whose dimensions lie in the order that ``spec`` has them in."""
    order = sorted(range(len(spec.shape)), key=lambda d: (-spec.stride[d], -spec.shape[d], d))
    stride, step = [0] * len(spec.shape), 1
    for d in reversed(order):
        stride[d] = step
        step *= max(spec.shape[d], 1)
    return stride


def wire_spec(tensor: Tensor) -> TensorSpec:
    return spec_to_wire(spec_of(tensor))
