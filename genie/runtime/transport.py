"""Moving values of a session between the client and the servers of a pool, and joining what is in parts.

Between servers they go by `Send` and `Expect`, never through the client.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence

from genie.errors import PlanError
from genie.frontend.entries import define
from genie.frontend.program import Program
from genie.runtime.failures import UNNUMBERED
from genie.runtime.layout import dense_stride, inverse, nbytes, order_of
from genie.runtime.peers import PeerGroup
from genie.runtime.placement import Placement, wire_spec
from genie.runtime.steps import Gather, Move, Narrow, Need
from genie.scheduler.batch_axis import part_spec
from genie.scheduler.where import Axis, Shard, Where
from genie.wire.messages import Adopt, Expect, Offer, Send, TensorSpec, Wanted

#: handles that the client makes up for parts of values; far beyond those of any program
_TEMPORARY = 1 << 60
_CAT = define("aten::cat.default", [["tl", 2], ["i"]], {}, [-1])
_SLICE = define("aten::slice.Tensor", [["t"], ["i"], ["i"], ["i"], ["i"]], {}, [-1])
#: binds the one kept slot of a program to the handle of its base, whichever slot it is
_FIRST_NAME = array("i", [0]).tobytes()


class Transport:
    """Moves what is in ``at``, and keeps that account; ``peers``: the servers that can exchange tensors."""

    def __init__(self, at: Placement, peers: PeerGroup) -> None:
        self._at = at
        self._peers = peers
        self._tags = self._temporaries = 0

    def unmet(self, handles: Sequence[int], needs: Sequence[Need]) -> list[int]:
        """Which of the values (by place) are not where they are needed. Raises the error of one that could
        not be made, before anything moves."""
        found = []
        for k, (h, need) in enumerate(zip(handles, needs, strict=True)):
            if not need.servers and need.sharded is None:
                continue
            place = self._at.place(h)
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
        at = self._at
        wanted: dict[tuple[int, int], list[int]] = {}
        known: Sequence | None = None
        for k in self.unmet(handles, needs) if unmet is None else unmet:
            h, need = handles[k], needs[k]
            place = at.place(h)
            if place.on_client:
                if need.sharded is not None:
                    self._shard(h, place, need.sharded, wire_spec(at.host[h]))
                    continue
                for s in need.servers:
                    self._from_host(h, s)
                at.leave_host(h, need.servers)
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
                place = at.place(h)
            for s in need.servers:
                if s not in place.servers:
                    wanted.setdefault((at.origin.get(h, place.servers[0]), s), []).append(k)
        for (source, target), places in wanted.items():
            assert known is not None
            self._copy([handles[k] for k in places], [known[k] for k in places], source, target)

    def _from_host(self, h: int, s: int) -> None:
        at = self._at
        tensor = at.host[h]
        at.held[s] += tensor.nbytes
        at.revive(s, h)
        at.links[s].upload(h, tensor, False)

    def _copy(self, handles: list[int], specs: list[TensorSpec], source: int, target: int) -> None:
        """Copies of whole values; what the target's store of shared contents has already is not sent."""
        at = self._at
        digests = {h: u.digest for h in handles if (u := at.uploaded.get(h)) is not None and u.digest}
        missing = set(digests)
        link = at.links[target]
        if digests:
            offered = list(digests)
            sizes = [nbytes(at.uploaded[h].spec) for h in offered]
            wanted, _ = link.connection.request(Offer([digests[h] or b"" for h in offered], sizes))
            assert isinstance(wanted, Wanted)
            missing = {offered[i] for i in wanted.missing}
        for h, spec in zip(handles, specs, strict=True):
            digest = digests.get(h)
            if digest is not None:
                spec = at.uploaded[h].spec
            if digest is not None and h not in missing:
                at.revive(target, h)
                link.connection.post(Adopt(h, spec, digest))
            else:
                self.transfer(h, h, spec, source, target, digest=digest)
            at.held[target] += nbytes(spec)
            at.origin.setdefault(h, source)
            at.where[h] = at.number(Where(servers=tuple(sorted({*at.place(h).servers, target}))))

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
        at = self._at
        if source == target:
            raise PlanError(f"a value was to move from server {source} to itself")
        self._peers.require([link for s, link in enumerate(at.links) if s not in at.lost])
        self._tags += 1
        plain = TensorSpec(spec.dtype, spec.shape, dense_stride(spec))
        if plain.stride != spec.stride:
            at.restrided.add(handle)
        at.revive(target, name)
        to, by = at.links[target], at.links[source]
        to.connection.post(Expect(name, plain, self._peers.rank(by), self._tags, digest))
        by.connection.post(Send(handle, plain, self._peers.rank(to), self._tags, narrow))

    def _shard(self, h: int, place: Where, wanted: Where, spec: TensorSpec) -> None:
        """A whole value becomes one by rows."""
        at = self._at
        if place.shards:
            self._gather_whole(h, place, wanted.shards[0].server, spec)
            place = at.place(h)
        at.aliases.part(h)
        at.restrided.add(h)
        axis, shards = wanted.axis, wanted.shards
        assert axis is not None
        size = shards[-1].stop
        if place.on_client:
            tensor = at.host[h]
            for shard in shards:
                part = tensor.narrow(axis.dim, shard.start * axis.inner, shard.rows * axis.inner)
                at.held[shard.server] += part.nbytes
                at.revive(shard.server, h)
                at.links[shard.server].upload(h, part.contiguous(), False)
            at.host_bytes -= at.host.pop(h).nbytes
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
            at.dead_but(h, place.servers, {shard.server for shard in shards})
        at.where[h] = at.number(wanted)
        at.origin.pop(h, None)
        at.uploaded.pop(h, None)

    def _narrow_in_place(self, h: int, axis: Axis, shard: Shard) -> None:
        """On a server that has the whole, the handle is bound to the rows that it needs."""
        literals = [axis.dim, shard.start * axis.inner, shard.stop * axis.inner, 1]
        self._run_one(shard.server, _SLICE, literals, [h], h)

    def _gather_whole(self, h: int, place: Where, target: int, spec: TensorSpec) -> None:
        """A value by rows becomes a whole one on ``target``."""
        at = self._at
        assert place.axis is not None
        at.aliases.part(h)
        at.restrided.add(h)
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
            at.dead[shard.server].append(h)
        self._join(target, handles, place.axis.dim, order_of(spec), h)
        at.dead[target] += temporaries
        at.where[h] = at.single[target]

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
        self._at.dead[step.server] += [h for h in handles if h != own]
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
        at = self._at
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
        link = at.links[server]
        at.revive(server, name)
        link.send(link.message(program, release=at.take_dead(server), quiet=True), [])


class _OneOp:
    """As much of an entry as a program of one instruction needs."""

    __slots__ = ("outs", "tid")

    def __init__(self, tid: int) -> None:
        self.tid = tid
        self.outs: list = []


def _cat(parts: int) -> int:
    return _CAT if parts == 2 else define("aten::cat.default", [["tl", parts], ["i"]], {}, [-1])
