"""``pytorch_rpc``: one ``torch.distributed.rpc`` worker per device, the model resident in each.

This process is member "client" (rank 0). Over link "tcp" tensors cross loopback TCP sockets between
it and the workers; those sockets are the wire that is counted.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import TracebackType

from torch.distributed import rpc

from genie.baselines import rpc_worker
from genie.baselines.peer_baseline import Link, PeerBaseline
from genie.devices import DeviceSlot
from genie.errors import ConfigError, ConnectError, ServerLostError, SessionClosedError
from genie.runtime.child_process import ChildProcess, tail

_LOOPBACK = {"TP_SOCKET_IFNAME": "lo", "GLOO_SOCKET_IFNAME": "lo"}


class RpcPool:
    """One worker process per device, started lazily. Link "tcp", or "shm" for torch's own choice.

    A process holds at most one RPC agent, so at most one RpcPool runs at a time. Start it from a
    thread that outlives it (see ``child_process``).
    """

    def __init__(self, devices: list[DeviceSlot], link: str = "tcp", start_timeout_s: float = 60.0) -> None:
        if link not in ("tcp", "shm"):
            raise ConfigError(f"unknown link {link!r} for pytorch_rpc: choose tcp or shm")
        self.devices = list(devices)
        self._kind = link
        self._start_timeout_s = start_timeout_s
        self._workers: list[ChildProcess] = []
        self._folder: Path | None = None
        self._member = False
        self._generation = 0
        self._lost: ServerLostError | None = None

    def __enter__(self) -> RpcPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def start(self) -> None:
        """Start the workers unless they run.

        Raises ConfigError when this process is an RPC member already, ConnectError when a worker does
        not come up, ServerLostError when the pool has lost one (``restart`` makes a new pool).
        """
        self._raise_if_lost()
        if self._member:
            return
        if rpc.api._is_current_rpc_agent_set():
            raise ConfigError("this process already runs torch.distributed.rpc: close the other pool first")
        self._folder = Path(tempfile.mkdtemp(prefix="genie-rpc-"))
        self._generation = generation = rpc._init_counter
        world = len(self.devices) + 1
        store = str(self._folder / "store")
        try:
            for rank, slot in enumerate(self.devices, start=1):
                self._workers.append(self._spawn(slot, rank, world, generation, store))
            for worker in self._workers:
                worker.wait_ready(self._start_timeout_s)
            with _environment(_LOOPBACK):
                rpc_worker.init_member(
                    0, world, generation, rpc_worker.options(store, self._kind, self._start_timeout_s)
                )
        except RuntimeError as error:  # c10d's errors (DistError) are RuntimeErrors
            log = self.log_tail()
            self.close()
            raise ConnectError(f"torch.distributed.rpc did not start: {error}", log) from error
        except BaseException:
            self.close()
            raise
        self._member = True

    def alive(self) -> bool:
        """Whether requests can run: every worker's process exists, and none was lost."""
        return self._member and self._lost is None and all(worker.alive() for worker in self._workers)

    def call(self, method: str, arguments: Sequence[tuple[object, ...]], timeout_s: float) -> list[object]:
        """See ``PeerPool.call``. A dead worker's pending call fails as soon as its socket closes."""
        self._raise_if_lost()
        if not self._member:
            raise SessionClosedError("the RPC pool is not running: call start() first")
        try:
            pending = [
                rpc.rpc_async(
                    rpc_worker.member_name(rank, self._generation),
                    rpc_worker.call,
                    (method, args),
                    timeout=timeout_s,
                )
                for rank, args in enumerate(arguments, start=1)
            ]
            return [future.wait() for future in pending]
        except RuntimeError as error:
            # ResidentModel returns its own errors as values: what is raised here is the RPC layer's.
            dead = [worker.pid for worker in self._workers if not worker.alive()]
            reason = (
                f"worker process {dead} died" if dead else f"no answer within {timeout_s:.0f} s, or a bad one"
            )
            self._lost = ServerLostError(
                f"pytorch_rpc lost a worker during {method}(): {reason} "
                f"({_first_line(error)}); restart the pool",
                self.log_tail(),
            )
            raise self._lost from error

    def link(self) -> Link:
        """Client end: this process. Server end: the workers."""
        return Link((os.getpid(),), tuple(worker.pid for worker in self._workers))

    def log_tail(self) -> str:
        return tail(*(worker.log for worker in self._workers))

    def restart(self) -> None:
        """A fresh set of workers, whatever happened to the old one."""
        self.close()
        self.start()

    def close(self) -> None:
        """End every worker and leave RPC. Safe to call twice, and after any failure."""
        # Workers first: a call still pending then fails at once, and leaving RPC waits for nothing.
        for worker in self._workers:
            worker.stop()
        self._workers = []
        if self._member or (rpc.api._is_current_rpc_agent_set() and self._folder is not None):
            rpc.shutdown(graceful=False)
        self._member = False
        self._lost = None
        if self._folder is not None:
            shutil.rmtree(self._folder)
            self._folder = None

    def _spawn(self, slot: DeviceSlot, rank: int, world: int, generation: int, store: str) -> ChildProcess:
        assert self._folder is not None
        threads = str(len(slot.cores)) if slot.type == "cpu" else None
        # RPC runs a call on any thread of its pool, and OpenMP's limit is one per thread: only the
        # environment reaches them all.
        env = _LOOPBACK | ({"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads} if threads else {})
        arguments = {
            "--slot": json.dumps(asdict(slot)),
            "--rank": str(rank),
            "--world": str(world),
            "--generation": str(generation),
            "--store": store,
            "--link": self._kind,
            "--timeout": str(self._start_timeout_s),
        }
        return ChildProcess(
            "genie.baselines.rpc_worker",
            [text for pair in arguments.items() for text in pair],
            self._folder / f"worker{rank}.log",
            env,
        )

    def _raise_if_lost(self) -> None:
        if self._lost is not None:
            raise ServerLostError(f"the RPC pool is broken: {self._lost}")


class PytorchRpc(PeerBaseline):
    """Baseline ``pytorch_rpc``; on a pool with link "shm" the extra row ``pytorch_rpc_shm``."""

    def __init__(self, pool: RpcPool, load_timeout_s: float = 300.0, run_timeout_s: float = 120.0) -> None:
        name = "pytorch_rpc" if pool._kind == "tcp" else "pytorch_rpc_shm"
        super().__init__(name, pool, load_timeout_s, run_timeout_s)


@contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    """Set environment variables for the duration, and put back what was there."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0]
