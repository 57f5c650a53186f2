from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import genie
from genie.devices import device_slot
from genie.frontend.session import Session
from genie.runtime.remote import open_link
from genie.runtime.server_process import ServerProcess, start_servers
from genie.runtime.stateless import StatelessExecutor

TOKEN = "tests"


@pytest.fixture(autouse=True, scope="session")
def device() -> None:
    genie.enable()  # before any test's first backward()


@pytest.fixture(scope="session")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[ServerProcess]]:
    logs: Path = tmp_path_factory.mktemp("servers")
    started = start_servers([device_slot("cpu", 0), device_slot("cpu", 1)], token=TOKEN, log_dir=logs)
    yield started
    for server in started:
        server.close()


@pytest.fixture(params=["local", "remote", "stateless"])
def session(request: pytest.FixtureRequest) -> Iterator[Session]:
    """Every promise of the frontend holds in process, on a server, and with state on the client."""
    if request.param == "local":
        opened = genie.local()
    else:
        servers = request.getfixturevalue("servers")
        if request.param == "remote":
            opened = genie.connect(servers[0].address, TOKEN)
        else:
            links = [open_link(s.address, TOKEN) for s in servers]
            opened = Session(StatelessExecutor(links, round_robin=True))
    with opened as s:
        yield s
