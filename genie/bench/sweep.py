"""The parallel correctness sweep: ``pytest bench_tests -n auto``.

Every cell once, verified, nothing timed. The controller owns one pool of servers and tells the
workers its addresses. These are pytest hooks for the ``conftest.py`` of a directory of cells:
only there is it known, before collection, that cells are going to run.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from genie.bench.cells import LATE_STAGES
from genie.bench.launchers import start_elsewhere
from genie.bench.options import BASELINES
from genie.bench.pool import ServerPool, StartedServers
from genie.bench.session import session_of
from genie.devices import DeviceSlot
from genie.errors import ConfigError, RemoteError

POOL_BASELINES = frozenset(
    name for name in BASELINES if name.startswith("genie_") and name != "genie_capture_only"
)
_POOL = pytest.StashKey["SharedPool"]()


class SharedPool:
    """The controller's pool, as a plugin of its run. Its logs are kept when something went wrong."""

    def __init__(self, slots: list[DeviceSlot], start: Callable[[Path], ServerPool] | None = None) -> None:
        """``start`` makes the pool, given the folder for logs (default: a server per slot, on this host)."""
        self.log_dir = Path(tempfile.mkdtemp(prefix="genie-logs-"))
        self._clean = False
        self.servers: ServerPool
        try:
            self.servers = start(self.log_dir) if start else StartedServers(slots, self.log_dir)
        except (RemoteError, ConfigError) as error:
            raise pytest.UsageError(f"{error}\nThe servers' logs are in {self.log_dir}") from error

    def pytest_sessionfinish(self, exitstatus: int) -> None:
        self._clean = exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED)

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter, exitstatus: int) -> None:
        if exitstatus not in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
            terminalreporter.write_line(f"genie: the servers' logs are in {self.log_dir}")

    def close(self) -> None:
        self.servers.close()
        if self._clean:
            shutil.rmtree(self.log_dir)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With a plain ``-n N``, all cells of a peer go to one worker: each worker would make its own pool.

    Not done with ``--dist loadgroup``, which pytest 9.2 broke for xdist 3.8 (node ids became read-only).
    """
    if config.getoption("dist") != "load":
        return None
    from xdist.scheduler import LoadScopeScheduling

    class PeersTogether(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return peer_of(nodeid) or nodeid

    return PeersTogether(config, log)


def peer_of(nodeid: str) -> str:
    """The peer whose cell this is: ``pytorch_rpc`` or ``ray``; "" for every other test."""
    identity = nodeid.rpartition("[")[2].rstrip("]")
    return next((peer for peer in LATE_STAGES if identity == peer or identity.startswith(f"{peer}-")), "")


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """In the controller, for each worker that is about to start."""
    session = session_of(node.config)
    if session.options.addresses or not POOL_BASELINES & set(session.options.baselines):
        return
    stash = node.config.stash
    if _POOL not in stash:
        if session.options.launch.launcher == "local":
            shared = stash[_POOL] = SharedPool(session.server_slots)
        else:
            shared = stash[_POOL] = SharedPool([], partial(start_elsewhere, session))
        node.config.pluginmanager.register(shared, "genie-shared-pool")
        node.config.add_cleanup(shared.close)
    pool = stash[_POOL].servers
    node.workerinput["genie_pool"] = {
        "addresses": list(pool.addresses),
        "token": pool.token,
        "pids": sorted(pool.pids),
        "tls_ca": pool.tls_ca,
    }
