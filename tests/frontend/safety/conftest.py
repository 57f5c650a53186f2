from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn

import genie
from genie.frontend.session import Session
from tests.frontend.conftest import TOKEN
from tests.frontend.safety.compare import Capture, Eager


class Lazy(Eager):
    """Plain ops on device genie."""

    device = "genie"


class Automatic(Capture):
    """A session with replay on: modules that are called again run compiled, without being asked to."""

    device = "genie"

    def __call__(self, program):
        return program if isinstance(program, nn.Module) else Program(program)


class Program(nn.Module):
    """A function as a module: replay looks at calls of modules."""

    def __init__(self, function) -> None:
        super().__init__()
        self.forward = function


class Compiled(Capture):
    """`torch.compile` with Genie's own backend."""

    device = "genie"

    def __call__(self, program):
        return torch.compile(program, backend="genie")


def replay_backend_exists() -> bool:
    return "genie" in torch._dynamo.list_backends()


#: where replay without being asked for has decisions of its own to make, beside those of compiling
AUTOMATIC = ("test_weights", "test_hooks", "test_python_state", "test_bad_input", "test_ended_sessions")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Every test runs in all modes, unless it names its own."""
    named = any("mode" in m.args[0] for m in metafunc.definition.iter_markers("parametrize"))
    if "mode" in metafunc.fixturenames and not named:
        modes = ["lazy", "lazy-remote", "compiled"]
        module = metafunc.module.__name__.rpartition(".")[2]
        if module in AUTOMATIC:
            modes.append("automatic")
        metafunc.parametrize("mode", modes, indirect=True)


@pytest.fixture
def mode(request: pytest.FixtureRequest) -> str:
    if request.param in ("compiled", "automatic") and not replay_backend_exists():
        pytest.skip("torch.compile knows no backend 'genie'")
    return request.param


@pytest.fixture
def session(mode: str, request: pytest.FixtureRequest) -> Iterator[Session]:
    """In this process for "lazy", on a server for the others."""
    if mode == "lazy":
        opened = genie.local()
    else:
        address = request.getfixturevalue("servers")[0].address
        opened = genie.connect(address, TOKEN, replay=mode == "automatic")
    with opened as s:
        yield s


@pytest.fixture
def capture(mode: str, session: Session, monkeypatch: pytest.MonkeyPatch) -> Iterator[Capture]:
    """How the test's programs reach device genie."""
    if mode.startswith("lazy"):
        yield Lazy()
        return
    torch._dynamo.reset()
    # Dynamo times the guards of each graph with cold caches, for its log: half of what a small graph costs.
    monkeypatch.setattr("torch._dynamo.guards.profile_guard_manager", lambda *_: 0.0, raising=False)
    # The programs here are so small that replay would leave them alone.
    monkeypatch.setattr("genie.frontend.replay.automatic.LEAST_OPS", 1)
    yield Compiled() if mode == "compiled" else Automatic()
    torch._dynamo.reset()


@pytest.fixture
def remote(servers) -> Iterator[Session]:
    """A session on a server process, for promises that do not depend on how ops are captured."""
    with genie.connect(servers[0].address, TOKEN) as s:
        yield s
