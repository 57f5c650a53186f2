"""A pool of servers on this host that torchrun starts: the smallest engine, with no cluster."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

from genie.device_facts import DeviceFacts
from genie.errors import ConfigError, ConnectError, ServerLostError
from genie.launch.pool_file import PoolFile, read_pool
from genie.runtime.child_process import on_all_cores, session_members, tail
from genie.runtime.connection import Connection
from genie.wire.auth import TOKEN_VARIABLE

START_SECONDS = 120.0
_CLOSE_SECONDS = 10.0
_POLL_SECONDS = 0.2


class TorchrunServers:
    """The pool of `genie.bench.pool.ServerPool`, on loopback. When one server dies torchrun ends all.

    Make it in a thread that outlives it. Raises ConnectError with the end of the log.
    """

    tls_ca = None

    def __init__(
        self, count: int, device_type: str, log_dir: Path, start_timeout_s: float = START_SECONDS
    ) -> None:
        self.token = secrets.token_hex(16)
        self._facts: dict[str, DeviceFacts] = {}
        log_dir.mkdir(parents=True, exist_ok=True)
        name = f"{os.getpid()}-{time.monotonic_ns()}"
        self._log = log_dir / f"torchrun-{name}.log"
        pool = log_dir / f"pool-{name}.json"
        # The servers inherit stdin, which ends with this process: they stop then, and so does torchrun.
        command = [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"),
            *("-m", "genie", "serve", "--pool", str(pool), "--pool-wait", f"{start_timeout_s:g}"),
            *("--device", device_type, "--host", "127.0.0.1", "--die-with-parent"),
        ]
        with open(self._log, "ab") as output, on_all_cores():
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
                env=os.environ | {TOKEN_VARIABLE: self.token},
                start_new_session=True,
            )
        self._sessions = {self._process.pid}
        try:
            self._pool = self._ready(pool, time.monotonic() + start_timeout_s)
        except BaseException:
            self.close()
            raise
        # torchrun gives each server a session of its own.
        self._sessions |= self.pids

    def _ready(self, path: Path, deadline: float) -> PoolFile:
        while True:
            try:
                return read_pool(path, _POLL_SECONDS)
            except ConnectError:
                if self._process.poll() is not None or time.monotonic() > deadline:
                    raise ConnectError(
                        "torchrun did not bring all servers up: see its log, or start fewer with "
                        "--genie-servers",
                        self.last_words(),
                    ) from None

    @property
    def addresses(self) -> tuple[str, ...]:
        return self._pool.addresses

    @property
    def pids(self) -> frozenset[int]:
        return frozenset(self._pool.pids)

    def facts(self, count: int) -> list[DeviceFacts]:
        for address in self.require(count):
            if address not in self._facts:
                with Connection.connect(address, self.token) as connection:
                    self._facts[address] = connection.welcome.facts
        return [self._facts[address] for address in self.addresses[:count]]

    def require(self, count: int) -> tuple[str, ...]:
        """See `ServerPool.require`."""
        if count > len(self.addresses):
            raise ConfigError(f"{count} servers are needed, but torchrun has started {len(self.addresses)}")
        if self._process.poll() is not None:
            raise ServerLostError(
                f"torchrun has ended with status {self._process.returncode}, and its servers with it: see "
                "its log below for the one that died first, and start the run again",
                self.last_words(),
            )
        return self.addresses[:count]

    def log_tails(self) -> dict[str, str]:
        """All write to one log, torchrun's."""
        return dict.fromkeys(self.addresses, self.last_words())

    def last_words(self) -> str:
        return tail(self._log)

    def close(self) -> None:
        """Ends torchrun and the servers. May be called twice."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        with suppress(ProcessLookupError):
            self._process.terminate()
        with suppress(subprocess.TimeoutExpired):  # it is killed below
            self._process.wait(_CLOSE_SECONDS)
        for session in self._sessions:
            for pid in session_members(session):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        self._process.wait(_CLOSE_SECONDS)
