"""A pool of real servers, and policies that put things where no scheduler would."""

from __future__ import annotations

import gc
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from weakref import WeakKeyDictionary

from genie.frontend.session import Session
from genie.runtime.pool import PoolExecutor
from genie.runtime.remote import open_link
from genie.runtime.server_process import ServerProcess
from genie.scheduler.cluster import NOMINAL_LINK
from genie.scheduler.placing import proposal, settled
from genie.scheduler.plan import BatchSplit, Declined, Placement
from genie.scheduler.problem import Policy, Problem
from genie.scheduler.where import Shard

TOKEN = "a token for pools"


def placed(problem: Problem, name: str, wish: list, split: BatchSplit | None = None) -> Placement | Declined:
    axes = split.batch.axes if split is not None else frozenset()
    return proposal(problem, Placement(name, settled(problem, wish, axes), "a test", split))


def at_home(problem: Problem) -> Placement | Declined:
    return placed(problem, "home", [(problem.cluster.home,)] * len(problem.graph.nodes))


class Home:
    """All on one server: the home, or server ``on``, where that is valid."""

    name = "home"

    def __init__(self, on: int | None = None) -> None:
        self.on = on

    def propose(self, problem: Problem) -> Sequence[Placement | Declined]:
        if self.on is None:
            return [at_home(problem)]
        return first_valid(problem, [placed(problem, self.name, [(self.on,)] * len(problem.graph.nodes))])


class Alternate:
    """Blocks of ``block`` instructions, on one server after the other."""

    name = "alternate"

    def __init__(self, block: int = 3, shift: int = 0) -> None:
        self.block, self.shift = block, shift

    def propose(self, problem: Problem) -> Sequence[Placement | Declined]:
        servers = [d.index for d in problem.cluster.devices]
        wish = [
            (servers[(k // self.block + self.shift) % len(servers)],) for k in range(len(problem.graph.nodes))
        ]
        return first_valid(problem, [placed(problem, self.name, wish)])


class Scatter:
    """Goes to any other server at any time; cheap instructions run on several servers at times."""

    name = "scatter"

    def __init__(self, seed: int = 0) -> None:
        self.dice = random.Random(seed)

    def propose(self, problem: Problem) -> Sequence[Placement | Declined]:
        servers = [d.index for d in problem.cluster.devices]
        wish = []
        at = self.dice.choice(servers)
        for node in problem.graph.nodes:
            if self.dice.random() < 0.15:
                at = self.dice.choice(servers)
            if problem.flow.cheap(node) and not node.writes and self.dice.random() < 0.05:
                wish.append(tuple(servers[:2]))
            else:
                wish.append((at,))
        return first_valid(problem, [placed(problem, self.name, wish)])


class Rows:
    """Splits the batch in ``rows``, wherever that is proven; with ``alone`` > 0 that part of the instructions
    runs on one server all the same, so that values are joined and divided in the middle of programs."""

    name = "rows"

    def __init__(self, *rows: int, alone: float = 0.0, seed: int = 0) -> None:
        self.rows, self.alone, self.dice = rows, alone, random.Random(seed)
        self.splits = 0
        self.refusals: list[str] = []

    def propose(self, problem: Problem) -> Sequence[Placement | Declined]:
        devices = [d.index for d in problem.cluster.devices]
        if not problem.may_split_batch or len(devices) < len(self.rows):
            return [at_home(problem)]
        externals: list[int] = []
        split = None
        for node in problem.graph.externals:
            v, spec = node.outputs[0], node.specs[0]
            where = problem.where[v]
            if spec is None or not spec.shape or v in problem.flow.weights:
                continue
            if where.shards and where.axis is not None and where.axis.dim == 0 and where.axis.inner == 1:
                split = where.shards
                externals.append(v)
            elif where.on_client and spec.shape[0] == sum(self.rows):
                externals.append(v)
        if not externals:
            return [at_home(problem)]
        batch = problem.prove_batch(problem.graph, externals)
        if isinstance(batch, str):
            self.refusals.append(batch)
            return [at_home(problem)]
        if split is None:
            shards, at = [], 0
            for server, count in zip(devices, self.rows, strict=False):
                shards.append(Shard(server, at, at + count))
                at += count
            split = tuple(shards)
        owners = tuple(sorted(s.server for s in split))
        wish = [
            (self.dice.choice(devices),)
            if self.dice.random() < self.alone and batch.local.isdisjoint((*node.inputs, *node.outputs))
            else owners
            for node in problem.graph.nodes
        ]
        found = placed(problem, self.name, wish, BatchSplit(batch, split))
        if isinstance(found, Declined):
            self.refusals.append(found.why)
        else:
            self.splits += 1
        return first_valid(problem, [found])


def first_valid(problem: Problem, proposals: Sequence[Placement | Declined]) -> list[Placement | Declined]:
    return [p for p in proposals if isinstance(p, Placement)] or [at_home(problem)]


def executor(servers: Sequence[ServerProcess], *policies: Policy, **options) -> PoolExecutor:
    links = [open_link(s.address, TOKEN) for s in servers]
    for number, link in enumerate(links):
        link.begin(f"{number:016d}")
    return PoolExecutor(links, policies, **{"peer": NOMINAL_LINK, "peer_timeout_s": 20.0} | options)


@contextmanager
def pooled(
    servers: Sequence[ServerProcess], *policies: Policy, replay: bool = False, **options
) -> Iterator[PoolExecutor]:
    """A session on the servers; its executor."""
    made = executor(servers, *policies, **options)
    with Session(made, replay=replay) as session:
        _FLUSH[made] = session.recorder.flush
        yield made


_FLUSH: WeakKeyDictionary[PoolExecutor, Callable[[], object]] = WeakKeyDictionary()


def handles(pool: PoolExecutor) -> list[int]:
    """How many handles each server that is alive holds for the session, when what died is released."""
    gc.collect()  # modules hold themselves in cycles
    _FLUSH[pool]()
    return [pool.links[s].counters().handles for s in pool.alive]
