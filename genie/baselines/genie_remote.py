"""The Genie baselines that execute on servers: one server, a pool without semantics, a pool with them."""

from __future__ import annotations

import hashlib
import secrets
import time
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from typing import Protocol

import torch
from torch import nn

import genie
from genie.baselines.protocol import Metering, PlanSummary, Receipt, Reply, Setup, Wire
from genie.config import ENGINES, MAX_RUN_AHEAD, POOL_FEATURES
from genie.errors import SessionClosedError
from genie.frontend.program import Executor
from genie.runtime.link import ServerLink
from genie.runtime.open_pool import PoolCosts, open_pool
from genie.runtime.pool import Explained, PoolExecutor
from genie.runtime.remote import ResidentExecutor, open_link
from genie.runtime.stateless import StatelessExecutor
from genie.scheduler.plan import Plan
from genie.scheduler.problem import Policy
from genie.workloads.protocol import Request, Response, Workload


class LinkedExecutor(Executor, Protocol):
    @property
    def links(self) -> tuple[ServerLink, ...]: ...


class _Remote:
    """The common part: run the workload on device ``genie``, then ask the links what happened."""

    name = ""
    remote = True

    def __init__(self, addresses: Sequence[str], token: str, tls_ca: str | None = None) -> None:
        self._addresses = list(addresses)
        self._token = token
        self._tls_ca = tls_ca
        self._session: genie.Session | None = None
        self._links: tuple[ServerLink, ...] = ()
        self._model: nn.Module | None = None
        self._workload: Workload | None = None
        self._response: Response | None = None
        self._nonce = ""

    def _executor(self) -> LinkedExecutor:
        raise NotImplementedError

    def _open(self, addresses: Sequence[str]) -> list[ServerLink]:
        links: list[ServerLink] = []
        try:
            for address in addresses:
                link = open_link(address, self._token, tls_ca=self._tls_ca)
                links.append(link)
                link.configure(*self._options())
        except BaseException:
            for link in links:
                link.close()
            raise
        return links

    def prepare(self, workload: Workload) -> Setup:
        self.close()
        start = time.perf_counter()
        model = workload.build_model()
        load_ms = (time.perf_counter() - start) * 1e3
        info = workload.model_info(model)
        executor = self._executor()
        self._links = executor.links
        self._session = genie.Session(executor, replay=self._replay()).activate()
        start = time.perf_counter()
        self._model = model.to("genie")
        self._session.synchronize()
        upload_ms = (time.perf_counter() - start) * 1e3
        self._workload = workload
        return Setup(setup_ms={"load": load_ms, "upload": upload_ms}, model=info, devices=self._devices())

    def _devices(self) -> int:
        return 1

    def _replay(self) -> bool:
        return False

    def _options(self) -> tuple[Collection[str], int]:
        """The servers' engines beside op by op, and how many windows they may run ahead."""
        return (), 0

    def run(self, request: Request) -> Response:
        if self._workload is None or self._model is None or self._session is None:
            raise SessionClosedError(f"{self.name} was asked to run before prepare(), or after close()")
        self._session.activate()  # another baseline's may have been opened since
        self._nonce = secrets.token_hex(8)
        for link in self._links:
            link.begin(self._nonce)
        self._response = self._workload.run(self._model, request, torch.device("genie"))
        return self._response

    def account(self) -> Reply:
        if self._response is None:
            raise SessionClosedError(f"{self.name} has no response to account for: call run() first")
        response, self._response = self._response, None
        reply = Reply(response=response)
        wires = []
        peer_in = peer_out = 0
        phases = dict.fromkeys(("capture", "send", "remote", "fetch"), 0.0)
        for link in self._links:
            out, into, trips, server_in, server_out = link.traffic()
            peer_in += link.peer_bytes[0]
            peer_out += link.peer_bytes[1]
            wires.append((out, into, trips, server_in, server_out))
            spent = link.timings
            phases["capture"] += spent.capture * 1e3
            phases["send"] += spent.send * 1e3
            phases["remote"] += spent.remote * 1e3
            phases["fetch"] += spent.fetch * 1e3
            if link.usage.receipts:
                reply.receipts.append(_receipt(link))
            reply.server_cpu_s += link.usage.cpu_s
        totals = [sum(column) for column in zip(*wires, strict=True)]
        reply.wire = Wire(
            bytes_out=totals[0],
            bytes_in=totals[1],
            round_trips=totals[2],
            server_in=totals[3],
            server_out=totals[4],
            peer_bytes=peer_out,
            peer_in=peer_in,
        )
        reply.phases_ms = phases
        return reply

    def _gpu_links(self) -> list[ServerLink]:
        return [link for link in self._links if link.connection.welcome.device_type == "cuda"]

    def start_meters(self) -> None:
        # The last request was accounted for, so nothing is on its way, and what is said here is no request's.
        for link in self._gpu_links():
            link.read_gpu(start=True)

    def read_meters(self) -> Metering:
        if not self._gpu_links():
            return Metering(why="no GPU: the servers run on CPUs")
        readings = [link.read_gpu() for link in self._gpu_links()]
        return Metering(tuple(reading.use for reading in readings if reading.use is not None))

    def close(self) -> None:
        self._model = self._workload = self._response = None
        if self._session is not None:
            self._session.close("the cell has ended")
            self._session = None


def _receipt(link: ServerLink) -> Receipt:
    """One receipt for all programs that one server ran for one request."""
    receipts = link.usage.receipts
    digest = hashlib.sha256(b"".join(r.digest for r in receipts)).hexdigest()
    counters: Counter[str] = Counter()
    for r in receipts:
        counters.update(r.counters)
    nonces = {r.nonce for r in receipts}
    return Receipt(
        pid=receipts[0].pid,
        device=receipts[0].device,
        # One request has one nonce: programs that answer with several did not all run for this one.
        nonce=nonces.pop() if len(nonces) == 1 else "",
        ops=sum(r.ops for r in receipts),
        programs=sum(1 for r in receipts if r.ops),
        digest=digest,
        counters=dict(counters),
    )


class GenieLocalRemote(_Remote):
    """Lazy capture, executed by ONE server: weights uploaded once, state stays there."""

    name = "genie_local_remote"

    def _executor(self) -> LinkedExecutor:
        return ResidentExecutor(self._open(self._addresses[:1])[0])


class GenieNoSemantics(_Remote):
    """The pool, round-robin per program; every live result comes back at every sync."""

    name = "genie_no_semantics"

    def _executor(self) -> LinkedExecutor:
        return StatelessExecutor(self._open(self._addresses), round_robin=True)

    def _devices(self) -> int:
        return len(self._addresses)


class GenieFull(_Remote):
    """The pool with semantic features.

    ``residency``: results stay on the server that made them. ``colocation``: the programs of a
    request run where its state is. Without either, state travels with each program, as in
    `GenieNoSemantics`; without colocation on a pool of one there is nowhere else to run. ``phases``,
    ``pipelining`` and ``branches``: a window of operations may be spread over the pool, where the scheduler
    expects that to pay; with ``cost_model`` it knows what that depends on, ``costs()``. ``replay``: modules
    that are called again are not captured anew. ``compiled``: the servers run programs with their engines,
    not only op by op. ``run_ahead``: they run what they foresee before it is asked for.
    """

    name = "genie_full"

    def __init__(
        self,
        addresses: Sequence[str],
        token: str,
        features: frozenset[str],
        tls_ca: str | None = None,
        *,
        costs: Callable[[], PoolCosts | None] = lambda: None,
        policies: Sequence[Policy] | None = None,
    ) -> None:
        super().__init__(addresses, token, tls_ca)
        self._features = features
        self._costs = costs
        self._policies = policies
        self._pool: PoolExecutor | None = None
        self._plan_s = 0.0

    def _executor(self) -> LinkedExecutor:
        self._pool = None
        colocated = "colocation" in self._features or len(self._addresses) == 1
        if colocated and "residency" in self._features:
            if len(self._addresses) == 1:
                return ResidentExecutor(self._open(self._addresses)[0])
            costs = self._costs() if "cost_model" in self._features else None
            links = self._open(self._addresses)
            features = self._features & {*POOL_FEATURES}
            self._pool = open_pool(links, features=features, policies=self._policies, costs=costs)
            return self._pool
        return StatelessExecutor(
            self._open(self._addresses if not colocated else self._addresses[:1]), round_robin=not colocated
        )

    def _devices(self) -> int:
        return 1 if "colocation" in self._features else len(self._addresses)

    def _replay(self) -> bool:
        return "replay" in self._features

    def _options(self) -> tuple[Collection[str], int]:
        return (
            ENGINES if "compiled" in self._features else (),
            MAX_RUN_AHEAD if "run_ahead" in self._features else 0,
        )

    @property
    def followed(self) -> list[Explained]:
        """The windows of the last request, each once, and what they were planned from."""
        if self._pool is None:
            return []
        plans = list({id(plan): plan for plan in self._pool.followed}.values())
        known = {id(one.plan): one for one in self._pool.explained}
        return [known[id(plan)] for plan in plans if id(plan) in known]

    def run(self, request: Request) -> Response:
        if self._pool is not None:
            self._plan_s = self._pool.plan_s
            self._pool.followed.clear()
        return super().run(request)

    def account(self) -> Reply:
        reply = super().account()
        pool = self._pool
        if pool is not None:
            reply.phases_ms["plan"] = (pool.plan_s - self._plan_s) * 1e3
            pids = [link.connection.welcome.pid for link in pool.links]
            reply.plans = [_summary(plan, pids) for plan in pool.followed]
        return reply


def _summary(plan: Plan, pids: Sequence[int]) -> PlanSummary:
    return PlanSummary(
        plan.placement.policy,
        plan.placement.label,
        plan.placement.why,
        tuple(pids[s] for s in plan.servers),
        None if plan.predicted_s is None else plan.predicted_s * 1e3,
    )
