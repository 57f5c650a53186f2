"""What belongs to a session that has ended says so; programs and reloaded models go on in the next one."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import nn

import genie
from genie.errors import SessionClosedError
from tests.frontend.conftest import TOKEN
from tests.frontend.safety.compare import counting, numbers


@pytest.fixture
def ended(servers) -> torch.Tensor:
    with genie.connect(servers[0].address, TOKEN):
        return counting("genie", 3) + 1


@pytest.mark.parametrize(
    "use",
    [
        lambda x: x.cpu(), lambda x: x.tolist(), lambda x: x.sum().item(), repr, str,
        lambda x: bool((x > 0).all()),
        lambda x: torch.zeros(3).copy_(x), lambda x: x + torch.ones(3, device="genie"),
        lambda x: torch.ones(3, device="genie") + x, lambda x: torch.ones(3, device="genie").copy_(x),
        lambda x: torch.cat([torch.ones(3, device="genie"), x]),
    ],
)  # fmt: skip
@pytest.mark.parametrize("another", [False, True], ids=["none open", "another open"])
def test_a_tensor_of_an_ended_session(ended, servers, use, another: bool) -> None:
    with pytest.raises(SessionClosedError, match=r"ended|no Genie session"):
        if another:
            with genie.connect(servers[0].address, TOKEN):
                use(ended)
        else:
            use(ended)


def test_an_op_on_a_tensor_of_an_ended_session_fails_at_once(ended, servers) -> None:
    with pytest.raises(SessionClosedError, match="ended"):
        ended * 2
    with torch.no_grad(), pytest.raises(SessionClosedError, match="ended"):
        ended * 2
    with genie.connect(servers[0].address, TOKEN), pytest.raises(SessionClosedError, match="ended"):
        ended.add_(1)


def test_tensors_of_an_ended_session_die_quietly(servers) -> None:
    with genie.connect(servers[0].address, TOKEN):
        x = counting("genie", 3)
        y = x + 1
    view = y.detach()
    assert view.shape == (3,) and view.device.type == "genie" and not view.requires_grad
    del x, y, view
    gc.collect()
    with genie.connect(servers[0].address, TOKEN):
        assert counting("genie", 3).sum().item() == 3


def test_a_model_of_an_ended_session_says_how_to_go_on(servers) -> None:
    with genie.connect(servers[0].address, TOKEN):
        model = nn.Linear(3, 2).to("genie")
        weights = {k: v.cpu() for k, v in model.state_dict().items()}
    with genie.connect(servers[0].address, TOKEN):
        x = torch.ones(1, 3, device="genie")
        for grad in (False, True):
            with torch.set_grad_enabled(grad), pytest.raises(SessionClosedError, match="ended"):
                model(x)
        with pytest.raises(SessionClosedError, match="ended"):
            model.cpu()
        fresh = nn.Linear(3, 2)
        fresh.load_state_dict(weights)
        assert fresh.to("genie")(x).shape == (1, 2)


@torch.no_grad()
def test_a_program_goes_on_in_the_next_session(capture, mode: str, servers) -> None:
    def f(x):
        return (x * 2).tanh() + torch.tensor([1.0, 2.0, 3.0], device=x.device)

    run = capture(f)
    for server in (servers[0], servers[1], servers[0]):
        with genie.connect(server.address, TOKEN, replay=mode == "automatic"):
            for i in range(3):
                x = numbers("cpu", 3, seed=i)
                torch.testing.assert_close(run(x.to("genie")).cpu(), f(x))


@torch.no_grad()
def test_a_model_loaded_anew_goes_on_in_the_next_session(capture, mode: str, servers) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(3, 3), nn.Tanh()), numbers("cpu", 2, 3)
    expected, weights = model(x), {k: v.clone() for k, v in model.state_dict().items()}
    model.to("genie")
    run = capture(model)
    for _ in range(3):
        run(x.to("genie"))
    for server in servers:
        with genie.connect(server.address, TOKEN, replay=mode == "automatic"):
            with pytest.raises(SessionClosedError, match=r"ended|two Genie sessions"):
                run(x.to("genie")).cpu()
            model.load_state_dict({k: v.to("genie") for k, v in weights.items()}, assign=True)
            for _ in range(3):
                torch.testing.assert_close(run(x.to("genie")).cpu(), expected)


def test_a_backward_in_an_ended_session(servers) -> None:
    with genie.connect(servers[0].address, TOKEN):
        w = counting("genie", 3).requires_grad_()
        loss = (w * w).tanh().sum()
    with pytest.raises(SessionClosedError, match="ended"):
        loss.backward()
    assert w.grad is None


def test_tensors_of_two_sessions_in_one_op(servers) -> None:
    with genie.connect(servers[0].address, TOKEN):
        a = counting("genie", 3)
        with genie.connect(servers[1].address, TOKEN):
            b = counting("genie", 3)
            for meet in (
                lambda: a + b,
                lambda: torch.cat([b, a]),
                lambda: b.copy_(a),
                lambda: torch.equal(a, b),
            ):
                with pytest.raises(SessionClosedError, match=r"two Genie sessions.*\.cpu\(\)"):
                    meet()
            assert (b + a.cpu().to("genie")).tolist() == [0, 2, 4]
        assert (a + 1).tolist() == [1, 2, 3]
