"""The promises that both peers keep, checked on a running pool."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from pathlib import Path

import psutil
import pytest
import torch
from tiny_workload import TinyWorkload

from genie.baselines.peer_baseline import PeerBaseline
from genie.errors import MeasurementError, RemoteOpError, ServerLostError, WireCountError
from genie.workloads import make_workload
from genie.workloads.protocol import Workload

LOST_WITHIN_S = 15.0  # well under every call's timeout, on a machine busy with other tests
DRIVER = """
import os, sys
from tiny_workload import TinyWorkload
from genie.devices import device_slot
from {module} import {pool}, {baseline}

baseline = {baseline}(pool := {pool}([device_slot("cpu", 0)]))
baseline.prepare(TinyWorkload())
print("ready", flush=True)
baseline.run(TinyWorkload(sleep_s=60).request(0)) if len(sys.argv) > 1 else sys.stdin.read()
"""


def local_response(workload: Workload, index: int):
    model = workload.build_model()
    request = workload.request(index)
    return model, request, workload.run(model, request, "cpu")


def check_requests(baseline: PeerBaseline, workload: Workload, devices: int) -> None:
    """Outputs, receipts and bytes of three requests, against the same workload run here."""
    setup = baseline.prepare(workload)
    assert setup.devices == devices
    assert setup.model == workload.model_info(workload.build_model())
    assert setup.setup_ms.keys() == {"load"}
    seen: set[str] = set()
    for index in range(3):
        model, request, reference = local_response(workload, index)
        response = baseline.run(request)
        reply = baseline.account()
        assert workload.verify(model, request, response, reference).ok
        assert reply.response is response
        pids = {receipt.pid for receipt in reply.receipts}
        assert len(pids) == devices
        assert os.getpid() not in pids
        nonces = {receipt.nonce for receipt in reply.receipts}
        assert len(nonces) == devices
        assert not nonces & seen
        seen |= nonces
        sent = sum(t.nbytes for t in request.inputs.values())
        returned = sum(t.nbytes for t in response.outputs.values())
        assert sent <= reply.wire.bytes_out <= sent + 40_000
        assert returned <= reply.wire.bytes_in <= returned + 40_000
        assert (reply.wire.bytes_out, reply.wire.bytes_in) == (reply.wire.server_in, reply.wire.server_out)
        assert reply.wire.round_trips is None
        assert reply.phases_ms["remote"] > 0
        assert reply.tokens_observed_at == "server"
    baseline.close()


def check_smoke_workload(baseline: PeerBaseline, name: str) -> None:
    """A real workload of the smoke profile, verified as the suite does."""
    workload = make_workload(name, "smoke")
    baseline.prepare(workload)
    model, request, reference = local_response(workload, 0)
    response = baseline.run(request)
    reply = baseline.account()
    assert workload.verify(model, request, response, reference).ok
    assert len(response.token_s) == len(reference.token_s)
    assert reply.server_cpu_s > 0
    baseline.close()


def check_faults_of_the_workload(baseline: PeerBaseline) -> None:
    """The workload's own errors arrive typed, with the worker's traceback; the pool survives them."""
    with pytest.raises(RemoteOpError, match="this model cannot be built"):
        baseline.prepare(TinyWorkload(fault="build"))
    with pytest.raises(MeasurementError, match="different models"):
        baseline.prepare(TinyWorkload(fault="seeding"))
    workload = TinyWorkload(fault="run")
    baseline.prepare(workload)
    with pytest.raises(RemoteOpError, match="this request cannot be run") as caught:
        baseline.run(workload.request(0))
    assert "tiny_workload.py" in caught.value.log_tail
    check_requests(baseline, TinyWorkload(rows=4096), devices=2)


def check_bytes_are_per_request(baseline: PeerBaseline) -> None:
    """Two requests without an account in between cannot be told apart, and are refused."""
    workload = TinyWorkload()
    baseline.prepare(workload)
    baseline.run(workload.request(0))
    baseline.run(workload.request(1))
    with pytest.raises(WireCountError, match="2 requests"):
        baseline.account()
    baseline.mark()
    baseline.run(workload.request(2))
    assert baseline.account().wire.bytes_out > 0


def check_loss_during_a_request(baseline: PeerBaseline, pool) -> None:
    """SIGKILL in the middle of a request: a typed error at once, with the log; then every call fails fast."""
    workload = TinyWorkload(splittable=False, sleep_s=60.0)
    pool.start()
    victim = worker_pids(pool)[0]
    baseline.prepare(workload)
    killer = threading.Timer(0.5, os.kill, (victim, signal.SIGKILL))
    killer.start()
    start = time.monotonic()
    with pytest.raises(ServerLostError) as caught:
        baseline.run(workload.request(0))
    assert time.monotonic() - start < LOST_WITHIN_S
    killer.join()
    assert "name='tiny'" in caught.value.log_tail
    assert not pool.alive()
    with pytest.raises(ServerLostError, match="restart"):
        baseline.prepare(TinyWorkload())
    baseline.close()


def check_loss_before_a_request(baseline: PeerBaseline, pool) -> None:
    """SIGKILL between two requests: the pool knows, and the next request fails at once."""
    workload = TinyWorkload()
    baseline.prepare(workload)
    victim = psutil.Process(worker_pids(pool)[-1])
    victim.kill()
    victim.wait(5)
    assert not pool.alive()
    start = time.monotonic()
    with pytest.raises(ServerLostError):
        baseline.run(workload.request(0))
    assert time.monotonic() - start < LOST_WITHIN_S


def check_no_orphans_after_sigkill(module: str, pool: str, baseline: str) -> None:
    """Everything a driver started ends with it, even when it gets no chance to clean up."""
    driver = subprocess.Popen(
        [sys.executable, "-c", DRIVER.format(module=module, pool=pool, baseline=baseline)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])},
    )
    try:
        assert driver.stdout is not None
        assert driver.stdout.readline() == b"ready\n"
        started = psutil.Process(driver.pid).children(recursive=True)
        assert started
    finally:
        driver.kill()
        driver.wait(10)
    assert_gone(started)


def assert_gone(processes: Iterable[psutil.Process], timeout_s: float = 20.0) -> None:
    _, left = psutil.wait_procs(list(processes), timeout=timeout_s)
    assert [p for p in left if p.is_running() and p.status() != psutil.STATUS_ZOMBIE] == []


def worker_pids(pool) -> list[int]:
    """Pids of the workers that hold models, in the order of the devices."""
    return [reply.pid for reply in pool.call("load", [(TinyWorkload(),)] * len(pool.devices), 60.0)]


def small_batch() -> TinyWorkload:
    """Tensors well below the sizes at which the libraries change their path."""
    torch.manual_seed(0)
    return TinyWorkload(rows=3)
