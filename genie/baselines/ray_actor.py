"""``ray_actor``: one Ray actor per device, the model resident in each, tensors over TCP.

This process is the driver, attached to the head's raylet; the actors live on another raylet of the
same local cluster. Client end of the wire: driver and head raylet. Server end: actors and their
raylet. An argument or result of 100 KB and more goes raylet to raylet, a smaller one inside the
call. Traffic with the cluster's control store (heartbeats, resource views) belongs to neither.
"""

from __future__ import annotations

import importlib
import logging
import os
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any

from genie.baselines.peer_baseline import Link, PeerBaseline
from genie.baselines.peer_worker import ResidentModel
from genie.baselines.ray_cluster import ACTOR_RESOURCE, HEAD_ADDRESS
from genie.devices import DeviceSlot
from genie.errors import ConfigError, ConnectError, MeasurementError, ServerLostError, SessionClosedError
from genie.runtime.child_process import ChildProcess, on_all_cores, running, tail

_ZERO_COPY = "RAY_ENABLE_ZERO_COPY_TORCH_TENSORS"
_RAY_ENV = {
    "RAY_USAGE_STATS_ENABLED": "0",
    # Tensors out of band, as numpy arrays travel, instead of through pickle: what Ray itself offers
    # to those who measure. Read when ray is first imported.
    _ZERO_COPY: "1",
    # Actors see every GPU, and use the one of their slot.
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
#: In the driver, which starts when the control store is up: one try, of about 40 s. Ray makes 20 otherwise,
#: so that ``ray.init`` on a cluster whose control store has died hangs for a quarter of an hour.
_CONNECT_TRIES = "RAY_NUM_REDIS_GET_RETRIES"
_STORE_BYTES = 512 << 20
_STOP_GRACE_S = 15.0
_HEALTH_CHECK_S = 1.0


class RayPool:
    """A local cluster with one actor per device, started lazily. Link "tcp", or "shm" for one raylet.

    A process drives at most one cluster, so at most one RayPool runs at a time. Start it from a
    thread that outlives it (see ``child_process``).
    """

    def __init__(
        self,
        devices: list[DeviceSlot],
        link: str = "tcp",
        start_timeout_s: float = 120.0,
        store_bytes: int = _STORE_BYTES,
    ) -> None:
        if link not in ("tcp", "shm"):
            raise ConfigError(f"unknown link {link!r} for ray: choose tcp or shm")
        self.devices = list(devices)
        self._kind = link
        self._start_timeout_s = start_timeout_s
        self._store_bytes = store_bytes
        self._cluster: ChildProcess | None = None
        self._folder: Path | None = None
        self._daemons: dict[str, int] = {}
        self._logs: Path | None = None
        self._ray: ModuleType | None = None
        self._actors: list[Any] = []
        self._actor_pids: list[int] = []
        self._lost: ServerLostError | None = None

    def __enter__(self) -> RayPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def start(self) -> None:
        """Start cluster and actors unless they run.

        Raises ConfigError without ray, without room in shared memory or when this process drives a
        cluster already, MeasurementError when ray was imported too early, ConnectError when the cluster
        does not come up, ServerLostError when the pool has lost an actor (``restart`` makes a new pool).
        """
        self._raise_if_lost()
        if self._actors:
            return
        ray = _import_ray()
        if ray.is_initialized():
            raise ConfigError("this process already drives a Ray cluster: close the other pool first")
        self._check_shared_memory()
        try:
            self._start(ray)
        except BaseException:
            self.close()
            raise

    def alive(self) -> bool:
        """Whether requests can run: cluster and actors exist, and none was lost."""
        return bool(self._actors) and self._lost is None and self._gone() is None

    def call(self, method: str, arguments: Sequence[tuple[object, ...]], timeout_s: float) -> list[object]:
        """See ``PeerPool.call``. A dead process is noticed by Ray, or by pid within a second."""
        self._raise_if_lost()
        if self._ray is None or not self._actors:
            raise SessionClosedError("the Ray pool is not running: call start() first")
        ray = self._ray
        # Without the cluster's daemons Ray retries for a minute, then ends this whole process.
        if reason := self._gone():
            raise self._lose(method, reason)
        try:
            pending = [
                getattr(actor, method).remote(*args)
                for actor, args in zip(self._actors, arguments, strict=False)
            ]
            return self._gather(ray, pending, timeout_s)
        except _NoAnswer as silence:
            raise self._lose(method, str(silence)) from None
        except ray.exceptions.RayTaskError:
            # Only if a request does not unpickle: ResidentModel returns its own errors as values.
            raise
        except ray.exceptions.RayError as error:
            raise self._lose(method, f"{type(error).__name__}: {_first_line(error)}") from error

    def _gather(self, ray: ModuleType, pending: list[Any], timeout_s: float) -> list[Any]:
        """What the actors return. Raises _NoAnswer once a process is gone, or the time is over."""
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                return ray.get(pending, timeout=_HEALTH_CHECK_S)
            except ray.exceptions.GetTimeoutError:
                if reason := self._gone():
                    raise _NoAnswer(reason) from None
                if time.monotonic() > deadline:
                    raise _NoAnswer(f"no answer within {timeout_s:.0f} s") from None

    def link(self) -> Link:
        """Client end: driver and head raylet. Server end: actors and their raylet (no raylet over shm)."""
        if self._kind == "shm":
            return Link((os.getpid(),), tuple(self._actor_pids))
        return Link(
            (os.getpid(), self._daemons["head_raylet"]), (self._daemons["actor_raylet"], *self._actor_pids)
        )

    def log_tail(self) -> str:
        logs: list[Path] = [self._cluster.log] if self._cluster is not None else []
        if self._logs is not None:
            logs += sorted(self._logs.glob("raylet*.err"))
            for pid in self._actor_pids:
                logs += sorted(self._logs.glob(f"worker-*-{pid}.*"))
        return tail(*logs)

    def restart(self) -> None:
        """A fresh cluster, whatever happened to the old one."""
        self.close()
        self.start()

    def close(self) -> None:
        """End driver, actors and cluster. Safe to call twice, and after any failure."""
        self._disconnect()
        if self._cluster is not None:
            self._cluster.stop(grace_s=_STOP_GRACE_S)
            self._cluster = None
        self._daemons, self._logs, self._lost = {}, None, None
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)  # a daemon killed late may still write a log
            self._folder = None

    def _start(self, ray: ModuleType) -> None:
        # Ray's sockets live below it, and a socket's path may have 107 characters: not under TMPDIR.
        self._folder = Path(tempfile.mkdtemp(prefix="gray", dir="/tmp"))
        self._cluster = ChildProcess(
            "genie.baselines.ray_cluster",
            [
                "--actors",
                str(len(self.devices)),
                "--store-bytes",
                str(self._store_bytes),
                "--link",
                self._kind,
            ],
            self._folder / "cluster.log",
            _RAY_ENV | {"RAY_TMPDIR": str(self._folder), _CONNECT_TRIES: "20"},
        )
        ready: dict[str, Any] = self._cluster.wait_ready(self._start_timeout_s)
        self._logs = Path(ready["logs"])
        self._daemons = {name: ready[name] for name in ("gcs", "head_raylet", "actor_raylet")}
        self._ray = ray
        try:
            self._raise_if_gone()
            with _own_signal_handlers(), on_all_cores():
                ray.init(
                    address=ready["address"],
                    _node_ip_address=HEAD_ADDRESS,
                    log_to_driver=False,
                    logging_level=logging.ERROR,
                )
            if ray.get_runtime_context().get_node_id() != ready["head_node"]:
                raise ConnectError(
                    "the driver attached to the actors' raylet: its tensors would not cross TCP"
                )
            actor = ray.remote(ResidentModel).options(num_cpus=1, resources={ACTOR_RESOURCE: 1})
            self._actors = [actor.remote(slot) for slot in self.devices]
            self._raise_if_gone()
            pids = [one.process_id.remote() for one in self._actors]
            self._actor_pids = self._gather(ray, pids, self._start_timeout_s)
        except (ray.exceptions.RayError, ConnectionError, RuntimeError, ValueError, _NoAnswer) as error:
            raise ConnectError(
                f"the Ray cluster did not start its actors: {_first_line(error)}; see the log, or leave out "
                "baseline ray",
                self.log_tail(),
            ) from error

    def _gone(self) -> str | None:
        """Which process of the pool has ended, or None."""
        if self._cluster is None or not self._cluster.alive():
            return "the cluster's supervisor process ended"
        for name, pid in self._daemons.items():
            if not running(pid):
                return f"{name} (pid {pid}) died"
        for pid in self._actor_pids:
            if not running(pid):
                return f"actor process {pid} died"
        return None

    def _raise_if_gone(self) -> None:
        if reason := self._gone():
            raise _NoAnswer(reason)

    def _lose(self, method: str, reason: str) -> ServerLostError:
        self._lost = ServerLostError(
            f"ray lost its actors during {method}(): {reason}; restart the pool", self.log_tail()
        )
        self._disconnect()
        return self._lost

    def _disconnect(self) -> None:
        self._actors, self._actor_pids = [], []
        if self._ray is not None:
            self._ray.shutdown()
            self._ray = None

    def _raise_if_lost(self) -> None:
        if self._lost is not None:
            raise ServerLostError(f"the Ray pool is broken: {self._lost}")

    def _check_shared_memory(self) -> None:
        stores = 1 if self._kind == "shm" else 2
        free = shutil.disk_usage("/dev/shm").free
        if free < stores * self._store_bytes:
            raise ConfigError(
                f"ray needs {stores * self._store_bytes >> 20} MiB of shared memory for its object stores, "
                f"/dev/shm has {free >> 20} MiB free: give the "
                "container more (docker --shm-size), or lower store_bytes"
            )


class _NoAnswer(Exception):
    """Why the actors will not answer any more."""


class RayActor(PeerBaseline):
    """Baseline ``ray`` (fixture ``ray_actor``); on a pool with link "shm" the extra row ``ray_shm``."""

    def __init__(self, pool: RayPool, load_timeout_s: float = 300.0, run_timeout_s: float = 120.0) -> None:
        super().__init__("ray" if pool._kind == "tcp" else "ray_shm", pool, load_timeout_s, run_timeout_s)


def _import_ray() -> ModuleType:
    os.environ.update(_RAY_ENV | {_CONNECT_TRIES: "1"})
    try:
        ray = importlib.import_module("ray")
    except ImportError as error:
        raise ConfigError(
            f"baseline ray needs Ray, which does not import ({error}): pip install ray"
        ) from error
    constants = importlib.import_module("ray._private.ray_constants")
    if getattr(constants, _ZERO_COPY, None) is False:
        raise MeasurementError(
            f"ray was imported in this process before {_ZERO_COPY} was set, so its tensors would go through "
            f"pickle and be slower than they need be: set {_ZERO_COPY}=1 in the environment, or do not "
            "import ray before the baseline starts"
        )
    return ray


@contextmanager
def _own_signal_handlers() -> Iterator[None]:
    """Undo ``ray.init``'s SIGTERM handler: how this process ends is pytest's business."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]
