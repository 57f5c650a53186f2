"""Servers as child processes: started in parallel, gone with their parent whatever ends it."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from genie.devices import DeviceSlot
from genie.errors import ConnectError
from genie.wire.auth import TOKEN_VARIABLE

READY_SECONDS = 120.0
TERM_SECONDS = 3.0


class ServerProcess:
    """One ``genie serve`` process, in a process group of its own."""

    def __init__(self, process: subprocess.Popen, address: str, device: str, log_file: Path) -> None:
        self._process = process
        self.address = address
        self.device = device
        self.log_file = log_file
        self.pid = process.pid

    @classmethod
    def start(
        cls,
        slot: DeviceSlot,
        *,
        token: str,
        log_dir: Path,
        extra_args: Sequence[str] = (),
        ready_seconds: float = READY_SECONDS,
    ) -> ServerProcess:
        """Starts a server and waits for its ready line. Raises ConnectError with the log's tail.

        The server dies with the *thread* that calls this (the kernel's rule for its parent-death
        signal): call it from one that lives as long as the server is needed.
        """
        starting = _Starting(slot, token, log_dir, extra_args)
        return starting.wait(time.monotonic() + ready_seconds)

    def alive(self) -> bool:
        return self._process.poll() is None

    def log_tail(self, n: int = 40) -> str:
        """The last ``n`` lines of the log, which also holds what the process wrote to stderr."""
        try:
            with open(self.log_file, "rb") as log:
                log.seek(0, os.SEEK_END)
                log.seek(max(0, log.tell() - 64 * 1024))
                text = log.read().decode(errors="replace")
        except FileNotFoundError:
            return ""
        return "\n".join(text.splitlines()[-n:])

    def close(self) -> None:
        """SIGTERM, and SIGKILL to the whole group after 3 s. May be called twice."""
        process = self._process
        if process.poll() is None:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):  # it is killed below
                process.wait(TERM_SECONDS)
        with contextlib.suppress(ProcessLookupError):  # nobody of the group is left
            os.killpg(self.pid, signal.SIGKILL)
        process.wait()
        if process.stdin is not None:
            process.stdin.close()

    def __enter__(self) -> ServerProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class _Starting:
    """A server process that has not printed its ready line yet."""

    def __init__(self, slot: DeviceSlot, token: str, log_dir: Path, extra_args: Sequence[str]) -> None:
        self._slot = slot
        log_dir.mkdir(parents=True, exist_ok=True)
        log_file = log_dir / f"server-{slot.type}{slot.index}-{os.getpid()}-{time.monotonic_ns()}.log"
        self._ready, ready_write = os.pipe()
        command = [
            sys.executable, "-m", "genie", "serve", "--port", "0", "--device", f"{slot.type}:{slot.index}",
            "--cores", ",".join(map(str, slot.cores)), "--log-file", str(log_file), "--die-with-parent",
            "--ready-fd", str(ready_write), *extra_args,
        ]  # fmt: skip
        try:
            with open(log_file, "ab") as output:
                process = subprocess.Popen(
                    command,
                    stdin=subprocess.PIPE,
                    stdout=output,
                    stderr=output,
                    env=os.environ | {TOKEN_VARIABLE: token},
                    pass_fds=(ready_write,),
                    start_new_session=True,
                )
        except BaseException:
            os.close(self._ready)
            raise
        finally:
            os.close(ready_write)
        self.server = ServerProcess(process, "", "", log_file)

    def wait(self, deadline: float) -> ServerProcess:
        """Raises ConnectError, and leaves no process, when the ready line does not come in time."""
        server, slot = self.server, self._slot
        try:
            line = _read_line(self._ready, deadline)
            if line is None:
                what = "was not ready in time" if server.alive() else "could not start"
                raise ConnectError(f"the server for {slot.type}:{slot.index} {what}", server.log_tail())
            ready = json.loads(line)
            server.address, server.device = ready["address"], ready["device"]
            return server
        except BaseException:
            server.close()
            raise
        finally:
            os.close(self._ready)


def _read_line(fd: int, deadline: float) -> bytes | None:
    """One line from the pipe; None when it closes, or the time is over, before the line is whole."""
    data = b""
    while not data.endswith(b"\n"):
        if not select.select([fd], [], [], max(0.0, deadline - time.monotonic()))[0]:
            return None
        part = os.read(fd, 4096)
        if not part:
            return None
        data += part
    return data


def start_servers(
    slots: Sequence[DeviceSlot],
    *,
    token: str,
    log_dir: Path,
    extra_args: Sequence[str] = (),
    ready_seconds: float = READY_SECONDS,
) -> list[ServerProcess]:
    """Starts all at once, and waits for all; when one fails, none is left and its error is raised.

    They die with the calling thread, like those of `ServerProcess.start`.
    """
    deadline = time.monotonic() + ready_seconds
    starting: list[_Starting] = []
    try:
        for slot in slots:
            starting.append(_Starting(slot, token, log_dir, extra_args))
        return [s.wait(deadline) for s in starting]
    except BaseException:
        for s in starting:
            s.server.close()
        raise
