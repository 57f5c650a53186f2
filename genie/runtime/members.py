"""The servers of a pool: which are alive, what the scheduler knows of them, and where uploads go."""

from __future__ import annotations

import copy
from collections.abc import Sequence

from torch import Tensor

from genie.errors import ConfigError, GenieError, ServerLostError
from genie.runtime.link import SHARED_BYTES, ServerLink
from genie.runtime.peers import PeerGroup
from genie.runtime.placement import Placement
from genie.scheduler.cluster import NOMINAL_LINK, Cluster, CostModel, Device, Link
from genie.scheduler.nominal import NominalCost
from genie.scheduler.where import Shard, Where
from genie.wire.messages import Load, LoadReply, Offer, Wanted

#: of a server's memory is left for activations, as long as another server has room for the parameters
_SPARE = 0.25


class Members:
    """``links`` are numbered as they come; numbers stay when servers are lost. ``at``: what they hold, and
    ``peers``: through which they exchange it. ``costs`` and ``client_links``: of each server, both or none;
    without them the pool is not calibrated, and the scheduler knows nominal rates only. ``peer``: what is
    between two servers, None where they cannot reach each other."""

    def __init__(
        self,
        links: Sequence[ServerLink],
        at: Placement,
        peers: PeerGroup,
        *,
        costs: Sequence[CostModel] | None = None,
        client_links: Sequence[Link] | None = None,
        peer: Link | None = None,
    ) -> None:
        if not links:
            raise ConfigError("a pool needs one server at least")
        known = [len(x) for x in (costs, client_links) if x is not None]
        if known not in ([], [len(links)] * 2):
            raise ConfigError(
                f"a pool of {len(links)} servers needs a cost model and a client link for each, or none at "
                "all: measure them with genie.cost.pool.pool_costs"
            )
        self.links = tuple(links)
        self.lost: dict[int, ServerLostError] = {}
        #: predicted seconds of work that each server has been given and has not done
        self.busy = [0.0] * len(links)
        self.home = -1  # has the session's random state; -1: not chosen yet
        self._upload_to = -1
        #: the random state was used, and then lost with its server
        self._drew = self._random_lost = False
        self._at = at
        self._peers = peers
        self._costs = None if costs is None else list(costs)
        self._client_links = None if client_links is None else list(client_links)
        self._peer = peer

    @property
    def alive(self) -> list[int]:
        """The servers that are not lost. The scheduler numbers its devices by their places here."""
        return [s for s in range(len(self.links)) if s not in self.lost]

    def as_device(self, place: Where) -> Where:
        if not self.lost:
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
        alive, nominal = self.alive, NominalCost()
        for k, s in enumerate(alive):
            link = self.links[s]
            welcome = link.connection.welcome
            client = NOMINAL_LINK if self._client_links is None else self._client_links[s]
            cost = nominal if self._costs is None else self._costs[s]
            devices.append(
                Device(
                    k, welcome.device, cost, client, welcome.memory_limit, self._at.held[s],
                    self.busy[s],
                )
            )  # fmt: skip
        peer = self._peer if len(alive) > 1 else None
        return Cluster(tuple(devices), peer, alive.index(self.home))

    # -- where uploads go, and random numbers ----------------------------------------------------------

    def require_home(self) -> None:
        """Raises ServerLostError when no server is left."""
        if self.home < 0:
            self.home = self._choose_home()

    def server_for(self, tensor: Tensor) -> int:
        """Uploads go to one server: where such content is already, else to the least loaded. What would leave
        it less than `_SPARE` of its memory goes to another that has more room."""
        at = self._at
        if self.home < 0:
            self.home = self._choose_home(tensor)
        if self._upload_to < 0 or self._upload_to in self.lost:
            self._upload_to = self.home
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
            raise copy.copy(next(iter(self.lost.values())))
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

    def draw(self, seeded: bool) -> None:
        """Random numbers must not go on from another state unnoticed. ``seeded``: they begin with a seed, or
        a state of their own. Raises ServerLostError."""
        if self._random_lost and not seeded:
            raise ServerLostError(
                "the session's random state was on a server that is lost: call torch.manual_seed() before "
                "drawing more random numbers"
            )
        self._drew, self._random_lost = True, False

    # -- coming and going ------------------------------------------------------------------------------

    def lose_dead(self, exc: GenieError) -> ServerLostError | None:
        """Takes note of the servers whose connections have ended; the first one's error, if there is one."""
        found: ServerLostError | None = None
        for s, link in enumerate(self.links):
            if s in self.lost or link.connection.alive:
                continue
            lost = exc if isinstance(exc, ServerLostError) and found is None else link.connection.lost
            if not isinstance(lost, ServerLostError):
                continue
            found = found or lost
            self._lose(s, lost)
        return found

    def _lose(self, s: int, exc: ServerLostError) -> None:
        """What only that server had is gone; the others go on."""
        self.lost[s] = exc
        self._peers.dissolve()
        self._at.lose(s)
        if self.home == s:
            self.home = -1
            self._random_lost = self._drew

    def add(self, link: ServerLink, cost: CostModel | None, client: Link | None) -> None:
        """Raises ConfigError where the pool is calibrated and the server is not, or the other way round."""
        if self._costs is not None and self._client_links is not None:
            if cost is None or client is None:
                raise ConfigError(
                    "the pool is calibrated, and nothing is predicted from invented figures: give the new "
                    "server's cost model (genie.cost.calibrate.load_or_calibrate) and the link to it "
                    "(genie.cost.links.client_link)"
                )
            self._costs.append(cost)
            self._client_links.append(client)
        elif cost is not None or client is not None:
            raise ConfigError(
                "the pool is not calibrated: add the server without a cost model and a link, or open a "
                "pool with costs"
            )
        link.begin(self.links[0].nonce)
        self.links = (*self.links, link)
        self._at.grow(link)
        self.busy.append(0.0)
        self._peers.dissolve()
