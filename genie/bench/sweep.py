"""The parallel correctness sweep: ``pytest bench_tests -n auto``.

Every cell once, verified, nothing timed. The controller owns one pool of servers and tells the
workers its addresses. These are pytest hooks for the ``conftest.py`` of a directory of cells:
only there is it known, before collection, that cells are going to run.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest

from genie.bench.options import BASELINES
from genie.bench.pool import ServerPool, StartedServers
from genie.bench.session import session_of

POOL_BASELINES = frozenset(
    name for name in BASELINES if name.startswith("genie_") and name != "genie_capture_only"
)
_POOL = pytest.StashKey[ServerPool]()


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """A plain ``-n N`` keeps the cells of each peer in one worker, which then makes one pool of it."""
    if config.getoption("numprocesses", None) and config.getoption("dist", "no") == "no":
        config.option.dist = "loadgroup"


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """In the controller, for each worker that is about to start."""
    # Workers read the command line again, where a plain -n says nothing of groups.
    node.workerinput["genie_groups"] = node.config.getoption("dist") == "loadgroup"
    session = session_of(node.config)
    if session.options.addresses or not POOL_BASELINES & set(session.options.baselines):
        return
    stash = node.config.stash
    if _POOL not in stash:
        log_dir = Path(tempfile.mkdtemp(prefix="genie-logs-"))
        pool: ServerPool = StartedServers(session.server_slots, log_dir)
        stash[_POOL] = pool
        node.config.add_cleanup(pool.close)
    pool = stash[_POOL]
    node.workerinput["genie_pool"] = {
        "addresses": list(pool.addresses),
        "token": pool.token,
        "pids": sorted(pool.pids),
    }
