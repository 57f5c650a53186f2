from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from genie.server.engines import select
from tests.server.engines.serving import Serving


@pytest.fixture(scope="module")
def shared() -> Iterator[Serving]:
    serving = Serving()
    yield serving
    serving.close()


@pytest.fixture(params=["rewritten", "graph"])
def serving(request: pytest.FixtureRequest, shared: Serving, monkeypatch: pytest.MonkeyPatch) -> Serving:
    """A server with either engine. No engine is given up for being slow: these models are tiny."""
    monkeypatch.setattr(select, "SLOWER", float("inf"))
    if request.param == "graph":
        shared.use_pool()
    else:
        shared.use_no_pool()
    return shared


@pytest.fixture
def graphs(shared: Serving, monkeypatch: pytest.MonkeyPatch) -> Serving:
    """A server with graphs, its pool empty."""
    monkeypatch.setattr(select, "SLOWER", float("inf"))
    shared.use_pool()
    return shared


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    yield
    torch._dynamo.reset()
