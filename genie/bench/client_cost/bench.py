"""One client-cost benchmark: Genie's client and plain eager PyTorch in turns, in one thread.

A round is ABBA (every second one BAAB): one request of Genie's, two of eager PyTorch with the same inputs,
and another one of Genie's. Its figure is the mean of Genie's two, its ratio that over the mean of eager's.
The servers are real processes on cores of their own. Figures are processor time of this process, in which
waiting for a server counts nothing and what the kernel does to send counts; so a busy machine disturbs
them less than wall time, and both sides alike.

Nothing fails on a ratio. A run fails when an output differs from eager PyTorch's, when receipts are
missing, contradict the feature or show too few replayed programs, and when the ends counted other bytes.
"""

from __future__ import annotations

import gc
import sys
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from statistics import fmean, median, median_low
from typing import TYPE_CHECKING, Any, cast

import pytest
import torch
from torch import nn

from genie.baselines.protocol import Reply, Setup
from genie.bench import clock, heap, progress, watchdog
from genie.bench.client_cost.works import TOKENS, Generation, Measured, Work
from genie.bench.features import check_features
from genie.bench.options import features_without
from genie.bench.placement import client_cores, placed
from genie.bench.receipts import check_both_ends
from genie.bench.schema import SCHEMA_VERSION
from genie.bench.session import ONE_SERVER
from genie.errors import MeasurementError, ReceiptError
from genie.workloads.protocol import Request, Workload

if TYPE_CHECKING:
    from genie.bench.pool import ServerPool
    from genie.bench.session import BenchSession

WORKLOAD = "client_cost"
LAZY, REPLAYED = "lazy", "replayed"
BASELINES = {LAZY: "genie_local_remote", REPLAYED: "genie_full"}
#: until every op was seen; replayed, until every kind of call was seen twice and compiled
WARM_UPS = {LAZY: 2, REPLAYED: 3}
#: tokens of a longer generation, whose bytes beyond the timed one's are those of the steady state
LONGER = TOKENS + 8


@dataclass
class _Request:
    """A timed request of Genie's with eager PyTorch's answer to the same inputs.

    ``cpu_s`` is processor time of all of it, what belongs to no step included.
    """

    request: Request
    reply: Reply
    cpu_s: float
    eager: Measured | None = None

    @property
    def measured(self) -> Measured:
        assert isinstance(self.reply.response, Measured)
        return self.reply.response


class ClientCostBench:
    """Fixture ``client_cost``. ``row`` is filled for the summary."""

    def __init__(self, session: BenchSession, pool: ServerPool, row: dict[str, Any]) -> None:
        self._session = session
        self._pool = pool
        self._row = row
        self._cores = client_cores(session.local_slot, remote=True)

    def measure(self, benchmark: Any, work: Work, capture: str = LAZY) -> dict[str, Any]:
        """Times, verifies and records ``work``; returns the ``extra_info``. Skips where the runtime, or
        the options, have no replay to measure."""
        benchmark.has_error = True  # nothing is saved, or shown, unless it is verified
        benchmark.extra_info.update(
            workload=WORKLOAD, baseline=BASELINES[capture], verified={"ok": False, "kind": None}
        )
        benchmark.group = f"client cost: {work.case}"
        self._row |= {"case": work.case, "capture": capture}
        if capture == REPLAYED and "replay" not in self._session.options.features:
            pytest.skip("the feature replay is switched off, or this runtime does not have it")
        try:
            with self._placed(), _SideBySide(self._session, self._pool, work, capture) as run:
                run.measure(benchmark)
                run.verify(timed=benchmark.enabled)
                return self._record(benchmark, work, capture, run)
        finally:
            if "torch._dynamo" in sys.modules:
                torch._dynamo.reset()  # guards of a model that is gone would be tried in the next benchmark

    def _placed(self) -> AbstractContextManager[None]:
        return nullcontext() if self._session.parallel else placed(self._cores)

    def _record(self, benchmark: Any, work: Work, capture: str, run: _SideBySide) -> dict[str, Any]:
        """Stores the keys that every result has, and ``client_cost``."""
        timed = benchmark.enabled
        target = work.target(capture)
        receipts = run.requests[-1].reply.receipts
        cost: dict[str, Any] = {
            "case": work.case,
            "capture": capture,
            "unit": work.unit,
            "clock": work.clock,
            "median_s": median(run.ours_s) if timed else None,
            "eager_median_s": median(run.eager_s) if timed else None,
            "ratio": run.ratio() if timed else None,
            "cpu_s": median(one.measured.cpu_s for one in run.requests) if timed else None,
            "wall_s": median(one.measured.wall_s for one in run.requests) if timed else None,
            "target_ratio": target.ratio,
            "target_s": target.seconds,
            **run.steady,
        }
        info = {
            "schema_version": SCHEMA_VERSION,
            "baseline": run.baseline.name,
            "workload": WORKLOAD,
            "profile": self._session.profile,
            "params": {"case": work.case, "capture": capture},
            "features": sorted(run.features),
            "ablated": [],
            "fingerprint": self._session.fingerprint(ONE_SERVER, remote=True),
            "model": {
                "name": run.setup.model.name,
                "params": run.setup.model.params,
                "dtype": run.setup.model.dtype,
            },
            "setup_ms": run.setup.setup_ms,
            "verified": {"ok": True, "kind": "allclose", "max_abs_err": run.max_abs_err},
            "wire": run.wire(),
            "receipt": {
                "pid": receipts[0].pid,
                "device": receipts[0].device,
                "ops": receipts[0].ops,
                "programs": receipts[0].programs,
                "digest": receipts[0].digest,
            },
            "phases_ms": {},
            "llm": None,
            "weights": {
                "source": run.setup.model.weights_source,
                "sha256": run.setup.model.weights_sha256,
            },
            "devices": 1,
            "cpu_s": {
                "client": median(one.cpu_s for one in run.requests),
                "server": median(one.reply.server_cpu_s for one in run.requests),
            },
            "client_cores": list(self._cores),
            "rounds": len(run.ours_s),
            "warmup": run.warm_ups if timed else 0,
            "cases": None,
            "ratio_to_local": None,
            "client_cost": {**cost, "eager_rounds_s": run.eager_s},
        }
        benchmark.extra_info.update(info)
        benchmark.has_error = False
        self._row |= cost
        return info


class _SideBySide:
    """A baseline with ``work`` on one server, and the same model on this process's CPU."""

    def __init__(self, session: BenchSession, pool: ServerPool, work: Work, capture: str) -> None:
        from genie.baselines.genie_remote import GenieFull, GenieLocalRemote

        self._session = session
        self._pool = pool
        self._work = work
        self._where = f"{work.case}, {capture}"
        self._replayed = capture == REPLAYED
        self.warm_ups = WARM_UPS[capture]
        self.features = features_without(()) if self._replayed else frozenset[str]()
        addresses = pool.require(1)
        self.baseline = (
            GenieFull(addresses, pool.token, self.features)
            if self._replayed
            else GenieLocalRemote(addresses, pool.token)
        )
        self.requests: list[_Request] = []
        self.untimed: list[_Request] = []
        self.ours_s: list[float] = []
        self.eager_s: list[float] = []
        self.steady: dict[str, float | None] = {"bytes_per_token": None, "trips_per_token": None}
        self.max_abs_err = 0.0
        self._next = 0
        self._model: nn.Module
        self.setup: Setup

    def __enter__(self) -> _SideBySide:
        return self

    def __exit__(self, *_: object) -> None:
        self.baseline.close()

    def measure(self, benchmark: Any) -> None:
        told = self._session.progress.phase
        watch = watchdog.Watchdog(self._where)
        with torch.no_grad(), watch:
            told(progress.PREPARE)
            with watch.limit(watchdog.PREPARE_S, "prepare()"):
                # Of a workload a baseline prepares and runs only what a work has, too.
                self.setup = self.baseline.prepare(cast(Workload, self._work))
            self._model = self._work.build_model()
            if benchmark.enabled:
                for number in range(self.warm_ups):
                    told(progress.WARM_UP, number + 1, self.warm_ups)
                    with watch.limit(watchdog.PREPARE_S, f"warm-up {number}"):
                        self._pair(ours_first=True)
            self.requests = []
            heap.settle()

            def one_round() -> None:
                number = len(self.ours_s)
                told(progress.ROUND, number + 1, self._work.rounds)
                gc.collect()
                with watch.limit(watchdog.REQUEST_S, f"round {number}"):
                    self._round(mirrored=bool(number % 2))

            benchmark.pedantic(one_round, rounds=self._work.rounds, iterations=1)
            if benchmark.enabled and isinstance(self._work, Generation):
                with watch.limit(watchdog.REQUEST_S, "a longer generation"):
                    self._measure_steady_state()
            told(progress.VERIFY)

    def _round(self, mirrored: bool) -> None:
        first, second = self._pair(ours_first=not mirrored), self._pair(ours_first=mirrored)
        both = [(self._figure(one.measured), self._figure(one.eager)) for one in (first, second)]
        ours, eager = (fmean(values) for values in zip(*both, strict=True))
        self.ours_s.append(ours)
        self.eager_s.append(eager)
        clock.count(ours)

    def _pair(self, ours_first: bool) -> _Request:
        """One request of each side with the same inputs, which no other pair has."""
        request = self._work.request(self._next)
        self._next += 1
        eager = None if ours_first else self._work.eager(self._model, request)
        one = self._ours(request)
        one.eager = eager if eager is not None else self._work.eager(self._model, request)
        self.requests.append(one)
        return one

    def _ours(self, request: Request) -> _Request:
        cpu = time.process_time()
        response = self.baseline.run(request)
        cpu = time.process_time() - cpu
        reply = self.baseline.account()
        if reply.response is not response:
            raise MeasurementError(f"{self._where}: account() describes another response than run() returned")
        return _Request(request, reply, cpu)

    def _figure(self, measured: Measured | None) -> float:
        assert measured is not None
        return measured.cpu_s if self._work.clock == "cpu" else measured.wall_s

    def _measure_steady_state(self) -> None:
        """What each token beyond the timed ones' adds, of a generation that was made before."""
        for index in (self._next, self._next + 1):
            longer = self._ours(self._work.request(index, str(LONGER)))
        self._next += 2
        longer.eager = self.requests[-1].eager
        self.untimed = [longer]
        wire, known, more = longer.reply.wire, self.wire(), LONGER - TOKENS
        total = wire.bytes_out + wire.bytes_in - known["bytes_out"] - known["bytes_in"]
        self.steady = {
            "bytes_per_token": total / more,
            "trips_per_token": ((wire.round_trips or 0) - known["round_trips"]) / more,
        }

    def ratio(self) -> float:
        return median(ours / eager for ours, eager in zip(self.ours_s, self.eager_s, strict=True))

    def wire(self) -> dict[str, Any]:
        """Per request, of what was really counted."""
        wires = [one.reply.wire for one in self.requests]
        return {
            "bytes_out": median_low(wire.bytes_out for wire in wires),
            "bytes_in": median_low(wire.bytes_in for wire in wires),
            "round_trips": median_low(wire.round_trips or 0 for wire in wires),
            "peer_bytes": 0,
        }

    def verify(self, *, timed: bool) -> None:
        """Raises the MeasurementError of what is wrong with any timed request."""
        if not self.requests:
            raise MeasurementError(f"{self._where}: no request was timed")
        with torch.no_grad():
            for one in (*self.requests, *self.untimed):
                assert one.eager is not None
                error = self._work.check(self._model, one.request, one.reply.response, one.eager)
                self.max_abs_err = max(self.max_abs_err, error)
        replies = [one.reply for one in (*self.requests, *self.untimed)]
        for reply in replies:
            self._session.receipts.check(
                reply, remote=True, counts_ops=True, server_pids=self._pool.pids, where=self._where
            )
            check_both_ends(reply.wire, exact=True, where=self._where)
        check_features(
            replies, baseline=self.baseline.name, features=self.features, servers=1, where=self._where
        )
        if timed and self._replayed:
            for reply in replies:
                replayed = sum(receipt.counters.get("replayed", 0) for receipt in reply.receipts)
                if replayed < self._work.calls:
                    raise ReceiptError(
                        f"{self._where}: {replayed} programs of a request were replayed, of the model's "
                        f"{self._work.calls} calls: what was timed is not replay; the log of genie.replay "
                        "says what stays lazy"
                    )
