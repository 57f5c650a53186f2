"""Pools of the peers that cannot start: an error within a bounded time, never a hang or a slower run."""

import importlib
import os
import subprocess
import sys

import pytest

from genie.baselines import ray_actor
from genie.devices import device_slot
from genie.errors import ConnectError, MeasurementError


@pytest.fixture
def ended_pid():
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait(30)
    return child.pid


class ClusterOf:
    """Stands in for the supervisor of a cluster that reports ready, with daemons of the given pid."""

    def __init__(self, pid):
        self.pid = pid

    def __call__(self, module, arguments, log, env):
        self.log = log
        return self

    def wait_ready(self, timeout_s):
        daemons = dict.fromkeys(("gcs", "head_raylet", "actor_raylet"), self.pid)
        return {"address": "127.0.0.2:1", "logs": "/nowhere", "head_node": "", **daemons}

    def alive(self):
        return True

    def stop(self, grace_s):
        pass


def test_ray_does_not_wait_for_a_control_store_that_has_died(monkeypatch, ended_pid):
    monkeypatch.setattr(ray_actor, "ChildProcess", ClusterOf(ended_pid))
    monkeypatch.setattr(importlib.import_module("ray"), "init", lambda **options: pytest.fail("would hang"))
    monkeypatch.setattr("ray._private.ray_constants.RAY_ENABLE_ZERO_COPY_TORCH_TENSORS", True)
    with pytest.raises(ConnectError, match=rf"gcs \(pid {ended_pid}\) died"):
        ray_actor.RayPool([device_slot("cpu", 0)]).start()


def test_rays_driver_tries_once_to_reach_the_control_store(monkeypatch):
    # Each try takes 40 s, and Ray's default is 20 tries.
    monkeypatch.setattr("ray._private.ray_constants.RAY_ENABLE_ZERO_COPY_TORCH_TENSORS", True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_NUM_REDIS_GET_RETRIES", "20")
        ray_actor._import_ray()
        assert os.environ["RAY_NUM_REDIS_GET_RETRIES"] == "1"


def test_ray_imported_without_zero_copy_is_an_error_not_a_slower_run(monkeypatch):
    importlib.import_module("ray")
    monkeypatch.setattr("ray._private.ray_constants.RAY_ENABLE_ZERO_COPY_TORCH_TENSORS", False)
    with pytest.raises(MeasurementError, match="RAY_ENABLE_ZERO_COPY_TORCH_TENSORS=1"):
        ray_actor.RayPool([device_slot("cpu", 0)]).start()
