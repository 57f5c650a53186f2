"""The Ray actor that keeps one server on the node where Ray has placed it."""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from genie.runtime.server_process import ServerProcess


class ServerActor:
    """A server dies with it: the kernel signals the child of a dead actor, whose stdin ends as well."""

    def __init__(self) -> None:
        self._server: ServerProcess | None = None
        self._logs: Path | None = None

    def start(
        self, device_type: str, place: int, host: str, token: str, args: Sequence[str], threads: str | None
    ) -> dict[str, Any]:
        """Starts the server that is number ``place`` on this node. Raises ConnectError with its log.

        ``threads``: OMP_NUM_THREADS of the client. Ray sets it to the number of CPUs that it has given to the
        actor, 1 beside a GPU, which a server that the client had started itself would not have.
        """
        # Here, because the driver imports this module too, and can do without torch.
        from genie.devices import DeviceSlot, available_cores, device_slot
        from genie.runtime.server_process import ServerProcess

        if threading.current_thread() is not threading.main_thread():
            raise RuntimeError(
                "the server would die with this thread: Ray ran an actor's method beside its main thread"
            )
        os.environ.pop("OMP_NUM_THREADS", None)
        if threads is not None:
            os.environ["OMP_NUM_THREADS"] = threads
        # Of the GPUs, Ray lets this process see its own alone.
        slot = (
            DeviceSlot("cuda", 0, available_cores()) if device_type == "cuda" else device_slot("cpu", place)
        )
        self._logs = Path(tempfile.mkdtemp(prefix="genie-logs-"))
        self._server = ServerProcess.start(
            slot, token=token, log_dir=self._logs, extra_args=["--host", host, *args]
        )
        return {
            "address": self._server.address, "device": self._server.device, "pid": self._server.pid
        }  # fmt: skip

    def state(self) -> tuple[bool, str]:
        """Whether the server lives, and the last lines of its log."""
        if self._server is None:
            return False, ""
        return self._server.alive(), self._server.log_tail()

    def close(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None
        if self._logs is not None:
            shutil.rmtree(self._logs, ignore_errors=True)  # a file system that is gone keeps its logs
            self._logs = None
