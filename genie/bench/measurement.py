"""Measuring one cell: prepare, one cold request, warm-ups, timed rounds, and then the trial.

A cell is guilty until proven: ``benchmark.has_error`` is set before anything runs and cleared only
after every timed response was verified, every receipt believed and every byte accounted for, so
that pytest-benchmark saves no timing of anything else, an interrupted cell included.

Each request has an index that no other request of the cell has, so nothing can be answered from a
cache. Memory that exists before the rounds is frozen out of the garbage collector and each round
starts collected; the collector stays on during the rounds, because a runtime that makes garbage
has to pay for it.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import count
from pathlib import Path
from statistics import median
from typing import Any

import torch

import genie
from genie.baselines.protocol import Baseline, Metered, Metering
from genie.bench import clock, heap, progress, watchdog
from genie.bench.features import check_features, is_stateless
from genie.bench.kernel_bytes import check_kernel_bytes, moved, sockets_of
from genie.bench.options import features_without
from genie.bench.oracle import check_bytes, least_bytes
from genie.bench.placement import client_cores, placed
from genie.bench.pool import with_logs
from genie.bench.receipts import check_both_ends
from genie.bench.record import CellRecord, Timed
from genie.bench.reference import as_returned, response_bytes
from genie.bench.session import BenchSession, LocalTimes, cell_group
from genie.config import FEATURES, IMPLEMENTED_FEATURES
from genie.errors import MeasurementError, ServerLostError, VerificationError
from genie.gpu_meter import GpuMeter
from genie.workloads.protocol import Workload

NOT_ASKED = "this baseline's processes are not asked"
#: requests before the timed ones count from here, so that the two can never share an index
WARM_UP_INDEX = 1_000_000
#: the request that is traced, after the timed ones
TRACE_INDEX = 2_000_000
#: timed responses waiting to be verified; beyond this they are verified between two rounds
PENDING_BYTES = 256 * 2**20


class Cell:
    """One workload on one baseline."""

    def __init__(
        self, session: BenchSession, baseline: Baseline, workload: Workload, ablated: Sequence[str] = ()
    ) -> None:
        self._session = session
        self._baseline = baseline
        self._workload = workload
        self._where = f"{cell_group(workload)} on {baseline.name}"
        self._repeats = session.repeats(workload.name)
        slot = session.local_slot
        features = features_without(ablated) if baseline.name == "genie_full" else frozenset()
        self.record = CellRecord(
            baseline=baseline.name,
            workload=workload.name,
            profile=workload.profile,
            params=dict(workload.params),
            features=tuple(feature for feature in FEATURES if feature in features),
            client_cores=client_cores(slot, baseline.remote),
            warmups=self._repeats.warmups,
            ablated=tuple(sorted(ablated)),
            fingerprint=session.fingerprint(baseline.name, baseline.remote),
        )
        self._local_cuda = slot.type == "cuda" and not baseline.remote
        self._meter = None if baseline.remote else GpuMeter(slot.torch_device)
        self._sockets = sockets_of(baseline.name, baseline.remote, session.pool)
        self._watchdog = watchdog.Watchdog(self._where)

    def measure(self, benchmark: Any) -> dict[str, Any]:
        """Runs and judges the cell; returns the ``extra_info`` it stored. Raises what went wrong."""
        benchmark.has_error = True
        benchmark.group = cell_group(self._workload)
        benchmark.extra_info.update(self.record.identity())
        try:
            with self._placed(self.record.client_cores), self._watchdog:
                self._run(benchmark)
                if benchmark.enabled and self.record.baseline.startswith("genie_"):
                    self._trace(self._session.options.trace)
        except ServerLostError as error:
            if self.record.baseline.startswith("genie_") and self._session.pool is not None:
                raise with_logs(error, self._session.pool) from error
            raise
        self._session.progress.phase(progress.VERIFY)
        with self._placed(self._session.local_slot.cores):
            self._check_evidence()
            self._check_weights()
            self._verify_pending()
        if benchmark.enabled:
            self._check_rounds(benchmark)
        info = self.record.extra_info()
        info["ratio_to_local"] = self._ratio_to_local() if benchmark.enabled else None
        if info["cases"] and info["receipt"] and self.record.baseline.startswith("genie_"):
            self._add_predictions(info)
        benchmark.extra_info.update(info)
        benchmark.has_error = False
        return info

    def _placed(self, cores: tuple[int, ...]) -> AbstractContextManager[None]:
        return nullcontext() if self._session.parallel else placed(cores)

    def _run(self, benchmark: Any) -> None:
        self._session.progress.phase(progress.PREPARE)
        with self._limit(watchdog.PREPARE_S, "prepare()"):
            self.record.setup = self._baseline.prepare(self._workload)
        if benchmark.enabled:
            self._warm_up()
        rounds = count()
        heap.settle()
        benchmark.pedantic(lambda: self._round(next(rounds)), rounds=self._repeats.rounds, iterations=1)

    def _warm_up(self) -> None:
        """The first request of a baseline that captures is its ``capture``, all others are ``warm``."""
        costs = dict(self.record.setup.setup_ms) if self.record.setup else {}
        first, *others = (self._warm_up_ms(number) for number in range(1 + self.record.warmups))
        if self.record.baseline.startswith("genie_"):
            costs.setdefault("capture", first)
        else:
            others.append(first)
        costs["warm"] = sum(others)
        self.record.setup_ms = costs

    def _warm_up_ms(self, number: int) -> float:
        if number:
            self._session.progress.phase(progress.WARM_UP, number, self.record.warmups)
        else:
            self._session.progress.phase(progress.COLD)
        index = WARM_UP_INDEX + number
        untimed = [self._request(-1, index, case) for case in self._workload.cases]
        for request in untimed:
            self._session.receipts.note(request.reply)
        return sum(request.seconds for request in untimed) * 1e3

    def _trace(self, folder: Path | None) -> None:
        """One more request, in all its cases, in a profile of its own: nothing is timed any more."""
        if folder is None:
            return
        path = folder / f"{trace_name(self.record)}.json.gz"
        with genie.profile(path):
            for case in self._workload.cases:
                self._session.receipts.note(self._request(-1, TRACE_INDEX, case).reply)
        self._session.traces.append(path)

    def _round(self, number: int) -> None:
        """Target of pytest-benchmark: request ``number``, in all its cases."""
        self._session.progress.phase(progress.ROUND, number + 1, self._repeats.rounds)
        gc.collect()
        for case in self._workload.cases:
            self.record.timed.append(self._request(number, number, case))
            if self._pending_bytes() > PENDING_BYTES:
                self._verify_pending()

    def _request(self, number: int, index: int, case: str) -> Timed:
        """One request on the clock; its inputs are made before, its receipts fetched after."""
        request = self._workload.request(index, case)
        if self._local_cuda:
            torch.cuda.synchronize()
        self._start_meters()
        sockets = self._sockets
        before = sockets.read() if sockets else {}
        with self._limit(watchdog.REQUEST_S, f"request {index}"):
            cpu_start = time.process_time()
            start = time.perf_counter()
            response = self._baseline.run(request)
            seconds = time.perf_counter() - start
            cpu = time.process_time() - cpu_start
            clock.count(seconds)
            # Both before account(), which talks to the servers, and could finish what run() left undone.
            kernel = moved(before, sockets.read(), self._where) if sockets else None
            returned = as_returned(response)
            reply = self._baseline.account()
            gpu = self._read_meters()
        if reply.response is not response:
            raise MeasurementError(f"{self._where}: account() describes another response than run() returned")
        reply.response = returned
        return Timed(
            number, index, case, seconds, cpu, reply, response_bytes(returned), kernel=kernel, gpu=gpu
        )

    def _start_meters(self) -> None:
        if self._meter is not None:
            self._meter.start()
        elif isinstance(self._baseline, Metered):
            with self._limit(watchdog.REQUEST_S, "reading the GPUs"):
                self._baseline.start_meters()

    def _read_meters(self) -> Metering:
        if self._meter is not None:
            use = self._meter.read()
            return Metering(why=self._meter.why) if use is None else Metering((use,))
        return (
            self._baseline.read_meters() if isinstance(self._baseline, Metered) else Metering(why=NOT_ASKED)
        )

    def _limit(self, seconds: float, doing: str) -> AbstractContextManager[None]:
        return self._watchdog.limit(seconds, doing) if self._baseline.remote else nullcontext()

    def _pending_bytes(self) -> int:
        return sum(timed.output_bytes for timed in self.record.timed if timed.verdict is None)

    def _check_evidence(self) -> None:
        """Receipts and byte counts of every timed request, and the features that they show."""
        if not self.record.timed:
            raise MeasurementError(f"{self._where}: no request was timed")
        genie = self.record.baseline.startswith("genie_")
        pool = self._session.pool
        servers = len(pool.addresses) if pool else 1
        for timed in self.record.timed:
            where = self._name(timed)
            self._session.receipts.check(
                timed.reply,
                remote=self._baseline.remote,
                counts_ops=genie,
                server_pids=pool.pids if genie and pool else frozenset(),
                where=where,
            )
            check_both_ends(timed.reply.wire, exact=genie, where=where)
            if timed.kernel is not None:
                # What TLS adds to each record is in the kernel's count, and not in Genie's.
                exact = genie and not (pool and pool.tls_ca)
                check_kernel_bytes(timed.kernel, timed.reply.wire, exact=exact, where=where)
        if genie and self._baseline.remote:
            check_features(
                [timed.reply for timed in self.record.timed],
                baseline=self.record.baseline,
                features=self.record.features,
                servers=servers,
                where=self._where,
                greedy=self._workload.name == "llm_decode",
            )
        stateless = is_stateless(self.record.baseline, self.record.features, servers)
        for timed in self.record.timed:
            least = least_bytes(
                self._workload,
                self._workload.request(timed.index, timed.case),
                timed.output_bytes,
                remote=self._baseline.remote,
                stateless=stateless,
            )
            check_bytes(timed.reply.wire, least, self._name(timed))

    def _check_weights(self) -> None:
        expected = self._session.reference(self._workload).model_info
        got = self.record.setup.model if self.record.setup else None
        if got is None or got.weights_sha256 != expected.weights_sha256:
            raise VerificationError(
                f"{self._where}: runs other weights (sha256 {got.weights_sha256 if got else None}) than "
                f"local_pytorch ({expected.weights_sha256}): the cells do not do the same work"
            )

    def _verify_pending(self) -> None:
        """Judge every timed response that was not judged yet, then let go of its tensors."""
        reference = self._session.reference(self._workload)
        for timed in self.record.timed:
            if timed.verdict is not None:
                continue
            timed.verdict = reference.judge(timed.index, timed.case, timed.reply.response)
            if not timed.verdict.ok:
                raise VerificationError(
                    f"{self._name(timed)}: the timed result differs from local_pytorch on the same inputs: "
                    f"{timed.verdict.detail or 'no detail'} (max abs error {timed.verdict.max_abs_err})"
                )
            timed.drop_outputs()

    def _check_rounds(self, benchmark: Any) -> None:
        """The saved figures must be the requests' times and nothing else (the cell's clock was in use)."""
        saved = benchmark.stats.stats.data
        for number, (figure, requests) in enumerate(zip(saved, self.record.round_seconds(), strict=True)):
            if not math.isclose(figure, requests, rel_tol=1e-6, abs_tol=1e-9):
                raise MeasurementError(
                    f"{self._where}: round {number} was recorded as {figure:.6f} s, but its requests took "
                    f"{requests:.6f} s: do not give a cell a benchmark timer of its own"
                )

    def _add_predictions(self, info: dict[str, Any]) -> None:
        # The runtime may be of another revision, which predicts nothing.
        if self._session.pool is not None and "cost_model" in IMPLEMENTED_FEATURES:
            from genie.bench.cost_rows import add_predictions

            add_predictions(info, self.record, self._session.pool.facts(1)[0])

    def _ratio_to_local(self) -> float | None:
        """Median over cases of time / local time; one case for all but the microbenchmark."""
        cases = self.record.case_medians()
        key = cell_group(self._workload)
        if self.record.baseline == "local_pytorch":
            self._session.local_times[key] = LocalTimes(cases=cases)
        local = self._session.local_times.get(key)
        if local is None:
            return None
        return median(seconds / local.cases[case] for case, seconds in cases.items())

    def _name(self, timed: Timed) -> str:
        return f"{self._where}, round {timed.round}" + (f", {timed.case}" if timed.case else "")


def trace_name(record: CellRecord) -> str:
    """Of a cell's trace, without a suffix: its workload, parameters, baseline and what was ablated."""
    params = (f"{name}{value}" for name, value in sorted(record.params.items()))
    return "-".join([record.workload, *params, record.baseline, *(f"no_{f}" for f in record.ablated)])
