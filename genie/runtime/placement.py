"""Where each handle of a session is, over a pool of servers.

Handles are the same number on every server. What the client uploads stays with the client until a
program needs it somewhere. How it gets there: `genie.runtime.transport`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor

from genie.errors import GenieError, PlanError, ServerLostError
from genie.frontend.specs import spec_of
from genie.frontend.specs import to_wire as spec_to_wire
from genie.runtime.aliasing import Aliases
from genie.runtime.link import ServerLink, int64s
from genie.scheduler.where import CLIENT, Where
from genie.wire.messages import Release, TensorSpec


@dataclass(frozen=True)
class Uploaded:
    """What the client knows of a parameter that it sent: geometry, and digest where servers share it."""

    spec: TensorSpec
    digest: bytes | None


class Placement:
    """The places of a session's values. ``where`` maps a handle to the number of a `Where` in ``places``;
    equal places have equal numbers, 0 is the client. Not thread-safe."""

    def __init__(self, links: Sequence[ServerLink]) -> None:
        self.links = list(links)
        self.places: list[Where] = [CLIENT]
        self._numbers: dict[Where, int] = {CLIENT: 0}
        self.where: dict[int, int] = {}
        self.host: dict[int, Tensor] = {}
        self.host_bytes = 0
        self.uploaded: dict[int, Uploaded] = {}
        self.held = [0] * len(self.links)
        #: of a value with copies: the server where its memory is. Writes and views that stay happen there
        self.origin: dict[int, int] = {}
        self.aliases = Aliases()
        #: handles whose values are no longer laid out as the client thinks: what moves becomes dense
        self.restrided: set[int] = set()
        #: why a handle has no value
        self.failed: dict[int, GenieError] = {}
        self.dead: list[list[int]] = [[] for _ in self.links]
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
            shared = h in self.aliases.group and self.origin.get(h, server) == server
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
        shared = self.aliases.group
        if self.uploaded or self.origin or shared:
            for h in handles:
                self.uploaded.pop(h, None)
                self.origin.pop(h, None)
                if h in shared:
                    self.aliases.release(h)
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

    def leave_host(self, h: int, servers: tuple[int, ...]) -> None:
        """The client's value is on ``servers`` from now on."""
        self.where[h] = self.number(Where(servers=servers))
        if len(servers) > 1:
            self.origin[h] = servers[0]
        self.host_bytes -= self.host.pop(h).nbytes

    def revive(self, server: int, handle: int) -> None:
        """A handle that is bound anew must not be freed for what it was before."""
        dead = self.dead[server]
        if dead and handle in dead:
            dead.remove(handle)

    def dead_but(self, h: int, servers: Sequence[int], needed: set[int]) -> None:
        """The handle's copies on ``servers`` die, but for those that are ``needed``."""
        for s in servers:
            if s not in needed:
                self.dead[s].append(h)

    def take_dead(self, server: int) -> bytes:
        dead = self.dead[server]
        if not dead:
            return b""
        taken = int64s(dead)
        dead.clear()
        return taken

    # -- shared memory -------------------------------------------------------------------------------

    def share(self, view: int, of: int) -> None:
        """``view`` shares memory with ``of``, whether that is alive or not."""
        self.aliases.share(view, of, of in self.where)

    def home(self, handle: int) -> int | None:
        """The server that has the memory of a whole value; None while that is open."""
        for h in self.aliases.sharing(handle):
            servers = self.places[self.where.get(h, 0)].servers
            if servers:
                return self.origin.get(h, servers[0])
        return None

    def may_be_home(self, handle: int, server: int) -> bool:
        """Whether ``server`` may write to the value, or make a view of it that stays."""
        return len(self.aliases.sharing(handle)) == 1 or self.home(handle) in (None, server)

    def write(self, handle: int, server: int) -> None:
        """The value is about to be written to on ``server``, which has it: its copies die, and those of what
        shares its memory. Raises PlanError where that memory is no longer one."""
        if self.aliases.parted(handle) or not self.may_be_home(handle, server):
            raise PlanError(
                "a value is written to that shares memory with another, but they were moved apart between "
                "servers: write to a .clone() of it, or keep only one of them"
            )
        for h in self.aliases.sharing(handle):
            self.uploaded.pop(h, None)
            if len(self.place(h).servers) > 1:
                self._keep_only(h, server)

    def settle_home(self, handle: int, server: int) -> None:
        """The memory of the value is on ``server`` from now on, which has a copy."""
        if handle in self.origin:
            self.origin[handle] = server

    # -- reading -------------------------------------------------------------------------------------

    def pieces(self, handle: int, prefer: int) -> list[int]:
        """The servers to read a value from: one that has it, or all that have rows of it, in order."""
        place = self.place(handle)
        if place.on_client:
            raise PlanError(f"handle {handle} is with the client: no server can describe it")
        if place.servers:
            return [prefer if prefer in place.servers else place.servers[0]]
        return [s.server for s in place.shards]


def wire_spec(tensor: Tensor) -> TensorSpec:
    return spec_to_wire(spec_of(tensor))
