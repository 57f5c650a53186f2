"""Promises of the ``ray`` peer: real worker processes, real sockets, real kills."""

from __future__ import annotations

from collections.abc import Iterator

import peer_checks as checks
import psutil
import pytest
from tiny_workload import TinyWorkload

from genie.baselines.ray_actor import RayActor, RayPool
from genie.devices import device_slot
from genie.errors import ConfigError, SessionClosedError

pytestmark = pytest.mark.timeout(180)


@pytest.fixture(scope="module")
def pool() -> Iterator[RayPool]:
    with RayPool([device_slot("cpu", 0), device_slot("cpu", 1)]) as pool:
        yield pool
    assert not pool.alive()


@pytest.fixture
def baseline(pool: RayPool) -> Iterator[RayActor]:
    baseline = RayActor(pool)
    yield baseline
    baseline.close()


def test_a_batch_is_split_over_both_workers(baseline):
    assert (baseline.name, baseline.remote) == ("ray", True)
    checks.check_requests(baseline, TinyWorkload(rows=4096), devices=2)


def test_small_tensors_are_counted_too(baseline):
    checks.check_requests(baseline, checks.small_batch(), devices=2)


def test_what_cannot_be_split_uses_one_worker(baseline):
    checks.check_requests(baseline, TinyWorkload(splittable=False, rows=1024), devices=1)


@pytest.mark.parametrize("name", ["llm_decode", "vision_cnn"])
def test_real_workloads_give_the_local_result(baseline, name):
    checks.check_smoke_workload(baseline, name)


def test_errors_of_the_workload_arrive_typed_and_the_pool_survives(baseline):
    checks.check_faults_of_the_workload(baseline)


def test_bytes_of_two_requests_are_never_mixed(baseline):
    checks.check_bytes_are_per_request(baseline)


def test_a_second_pool_in_the_same_process_is_refused(pool):
    pool.start()
    with pytest.raises(ConfigError, match="already"):
        RayPool([device_slot("cpu", 0)]).start()


def test_an_unprepared_baseline_says_so(pool):
    with pytest.raises(SessionClosedError, match="prepare"):
        RayActor(pool).run(TinyWorkload().request(0))


def test_a_worker_killed_in_the_middle_is_reported_at_once(baseline, pool):
    checks.check_loss_during_a_request(baseline, pool)


def test_a_restarted_pool_works_and_reports_a_worker_killed_while_idle(baseline, pool):
    pool.restart()
    checks.check_loss_before_a_request(baseline, pool)


def test_close_leaves_no_process_behind(pool):
    before = psutil.Process().children(recursive=True)
    assert before
    pool.close()
    checks.assert_gone(before)
    pool.close()


def test_nothing_outlives_a_driver_that_is_killed():
    checks.check_no_orphans_after_sigkill("genie.baselines.ray_actor", "RayPool", "RayActor")
