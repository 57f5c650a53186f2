"""Child processes of pools: started pinned to nothing, logged to a file, never orphaned.

A child dies with its parent in two ways: its stdin reaches end of file, and the kernel signals it
(``PR_SET_PDEATHSIG``). The kernel ties that signal to the *thread* that started the child, so a pool
must be started from a thread that lives as long as the pool (pytest's main thread does).
"""

from __future__ import annotations

import ctypes
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from genie.devices import available_cores
from genie.errors import ConnectError

_PR_SET_PDEATHSIG = 1
_TAIL_LINES = 40
_REAP_TIMEOUT_S = 10.0


def die_with_parent(parent: int, signum: int = signal.SIGKILL) -> None:
    """In the child's main thread: have the kernel send ``signum`` when ``parent``'s thread ends."""
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, int(signum)) != 0:
        errno = ctypes.get_errno()
        raise OSError(errno, f"prctl(PR_SET_PDEATHSIG): {os.strerror(errno)}")
    if os.getppid() != parent:  # it ended before the call above
        os._exit(1)


def report_ready(descriptor: int, message: dict[str, object]) -> None:
    """In the child: the one JSON line that tells the parent it is up."""
    with os.fdopen(descriptor, "w") as pipe:
        pipe.write(json.dumps(message) + "\n")


def wait_for_end_of_input() -> None:
    """In the child: block until the parent closes stdin, or dies."""
    while os.read(sys.stdin.fileno(), 4096):
        pass


def tail(*logs: Path) -> str:
    """The last lines of the log files, oldest file first; "" where there are none."""
    lines: list[str] = []
    for log in logs:
        if log.exists():
            lines += log.read_text(errors="replace").splitlines()
    return "\n".join(lines[-_TAIL_LINES:])


@contextmanager
def on_all_cores() -> Iterator[None]:
    """The calling thread, and what it starts, may use every core; its own mask returns afterwards."""
    mask = os.sched_getaffinity(0)
    os.sched_setaffinity(0, available_cores())
    try:
        yield
    finally:
        os.sched_setaffinity(0, mask)


class ChildProcess:
    """``python -m module`` in a session of its own, so that one signal ends it with its children."""

    def __init__(self, module: str, arguments: Sequence[str], log: Path, env: dict[str, str]) -> None:
        """Starts at once. The child gets ``--parent PID --ready-fd FD`` before ``arguments``."""
        self.log = log
        ready_read, ready_write = os.pipe()
        self._ready = ready_read
        try:
            with open(log, "ab") as output, on_all_cores():
                self._process = subprocess.Popen(
                    [
                        *(sys.executable, "-m", module),
                        *("--parent", str(os.getpid()), "--ready-fd", str(ready_write)),
                        *arguments,
                    ],
                    stdin=subprocess.PIPE,
                    stdout=output,
                    stderr=output,
                    pass_fds=(ready_write,),
                    start_new_session=True,
                    # What this process can import (a workload in a test module, say) the child must
                    # unpickle.
                    env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), **env},
                )
        finally:
            os.close(ready_write)

    @property
    def pid(self) -> int:
        return self._process.pid

    def alive(self) -> bool:
        return self._process.poll() is None

    def log_tail(self) -> str:
        return tail(self.log)

    def wait_ready(self, timeout_s: float) -> dict[str, object]:
        """The child's ready line. Raises ConnectError when it ends or stays silent instead."""
        deadline = time.monotonic() + timeout_s
        text = b""
        while not text.endswith(b"\n"):
            readable, _, _ = select.select([self._ready], [], [], max(0.0, deadline - time.monotonic()))
            if not readable:
                raise ConnectError(
                    f"process {self.pid} was not ready within {timeout_s:.0f} s: see its log, or start fewer "
                    "servers on this machine",
                    self.log_tail(),
                )
            chunk = os.read(self._ready, 65536)
            if not chunk:
                with suppress(subprocess.TimeoutExpired):
                    self._process.wait(_REAP_TIMEOUT_S)
                raise ConnectError(
                    f"process {self.pid} ended with code {self._process.poll()} before it was ready: the log "
                    "says why",
                    self.log_tail(),
                )
            text += chunk
        return json.loads(text)

    def stop(self, grace_s: float = 0.0) -> None:
        """Close stdin, give the child ``grace_s`` to leave, then kill what is left of its session."""
        if self._process.stdin is not None:
            with suppress(BrokenPipeError):
                self._process.stdin.close()
        if grace_s:
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(grace_s)
        for pid in session_members(self.pid):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._process.wait(_REAP_TIMEOUT_S)
        if self._ready >= 0:
            os.close(self._ready)
            self._ready = -1


def session_members(session: int) -> list[int]:
    """Pids whose session id is ``session`` (``proc_pid_stat(5)``, field 6); zombies left out."""
    members = []
    for name in os.listdir("/proc"):
        if not name.isdigit():
            continue
        with suppress(FileNotFoundError, ProcessLookupError):
            fields = Path(f"/proc/{name}/stat").read_text().rpartition(")")[2].split()
            if int(fields[3]) == session and fields[0] != "Z":
                members.append(int(name))
    return members


def running(pid: int) -> bool:
    """Whether the process exists and has not ended (a zombie has)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
