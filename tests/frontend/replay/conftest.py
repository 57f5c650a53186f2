from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import genie
from genie.frontend.session import Session
from genie.runtime.remote import open_link
from genie.runtime.stateless import StatelessExecutor
from tests.frontend.conftest import TOKEN


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield
    torch._dynamo.reset()


@pytest.fixture
def local() -> Iterator[Session]:
    with genie.local() as session:
        yield session


@pytest.fixture
def automatic() -> Iterator[Session]:
    with genie.local(replay=True) as session:
        yield session


@pytest.fixture(params=["remote", "stateless"])
def anywhere(request: pytest.FixtureRequest) -> Iterator[Session]:
    """Sessions with replay: on a server, and on two with the state on the client."""
    servers = request.getfixturevalue("servers")
    if request.param == "remote":
        opened = genie.connect(servers[0].address, TOKEN, replay=True)
    else:
        links = [open_link(s.address, TOKEN) for s in servers]
        opened = Session(StatelessExecutor(links, round_robin=True), replay=True)
    with opened as session:
        yield session
