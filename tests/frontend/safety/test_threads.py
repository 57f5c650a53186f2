"""Two models at once, in two threads: on one session, and on a session each."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable

import pytest
import torch
from torch import nn

import genie
from tests.frontend.conftest import TOKEN
from tests.frontend.safety.compare import numbers

JOIN_SECONDS = 60


def together(*programs: Callable[[], None]) -> None:
    """Runs each program in a thread of its own; raises the first error."""
    errors: list[BaseException] = []
    start = threading.Barrier(len(programs))

    def guarded(program: Callable[[], None]) -> None:
        try:
            start.wait(JOIN_SECONDS)
            program()
        except BaseException as exc:  # noqa: BLE001 - raised again in the test's thread
            errors.append(exc)

    threads = [threading.Thread(target=guarded, args=(p,), daemon=True) for p in programs]
    for t in threads:
        t.start()
    for t in threads:
        t.join(JOIN_SECONDS)
        assert not t.is_alive()
    if errors:
        raise errors[0]


def build(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))


def inference(model: nn.Module, run, expected: list[torch.Tensor], seed: int) -> Callable[[], None]:
    def program() -> None:
        with torch.no_grad():
            for _ in range(8):
                for i, value in enumerate(expected):
                    got = run(numbers("genie", 3, 4, seed=seed + i))
                    torch.testing.assert_close(got.cpu(), value, rtol=1e-5, atol=1e-6)

    return program


@torch.no_grad()
def expectations(model: nn.Module, seed: int) -> list[torch.Tensor]:
    return [model(numbers("cpu", 3, 4, seed=seed + i)) for i in range(4)]


def test_two_models_on_one_session(capture) -> None:
    programs = []
    for seed in (1, 2):
        model = build(seed)
        expected = expectations(model, seed)
        run = capture(model.to("genie"))
        with torch.no_grad():
            run(numbers("genie", 3, 4))  # compiling is not for two threads at once
        programs.append(inference(model, run, expected, seed))
    together(*programs)


def test_two_models_on_a_session_each(servers) -> None:
    programs = []
    with contextlib.ExitStack() as stack:
        for seed, server in zip((1, 2), servers, strict=True):
            model = build(seed)
            expected = expectations(model, seed)
            # Inputs are moved by ops on the weights, so that they reach the session of their model.
            session = stack.enter_context(genie.connect(server.address, TOKEN))
            model.to("genie")
            inputs = [numbers("genie", 3, 4, seed=seed + i) for i in range(4)]
            assert inputs[0]._h.rec is session.recorder

            def program(model=model, inputs=inputs, expected=expected) -> None:
                with torch.no_grad():
                    for _ in range(8):
                        for x, value in zip(inputs, expected, strict=True):
                            torch.testing.assert_close(model(x).cpu(), value, rtol=1e-5, atol=1e-6)

            programs.append(program)
        together(*programs)


def test_two_trainings_on_one_session(remote) -> None:
    def train(device: str, seed: int) -> list[torch.Tensor]:
        model = build(seed).to(device)
        step = torch.optim.SGD(model.parameters(), lr=0.1)

        def program() -> None:
            for i in range(6):
                step.zero_grad()
                model(numbers(device, 3, 4, seed=seed + i)).square().sum().backward()
                step.step()

        return program, model

    expected = [train("cpu", seed) for seed in (3, 4)]
    got = [train("genie", seed) for seed in (3, 4)]
    for program, _ in expected:
        program()
    together(*(program for program, _ in got))
    for (_, model), (_, reference) in zip(got, expected, strict=True):
        for p, q in zip(model.parameters(), reference.parameters(), strict=True):
            torch.testing.assert_close(p.detach().cpu(), q.detach(), rtol=1e-5, atol=1e-6)


def test_an_error_in_one_thread_leaves_the_other_alone(remote) -> None:
    model = build(5)
    expected = expectations(model, 5)
    model.to("genie")
    table = torch.ones(3, 4, device="genie") * 2

    def failing() -> None:
        for _ in range(5):
            with pytest.raises(RuntimeError, match="same device"):
                table + torch.ones(3, 4)

    together(failing, inference(model, model, expected, 5))
