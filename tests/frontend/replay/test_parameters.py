"""Parameters belong to the graphs of automatic replay, and still behave as parameters do."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import nn

from genie.frontend.replay import automatic as module
from genie.frontend.session import Session
from genie.frontend.tensor import LazyTensor
from tests.frontend.replay.test_automatic import deep

X = torch.linspace(-1, 1, 24).view(3, 8)


def replayed(model: nn.Module) -> nn.Module:
    remote = copy.deepcopy(model).to("genie")
    for _ in range(3):
        remote(X.to("genie"))
    return remote


def replace(layer: nn.Linear, value: torch.Tensor) -> None:
    layer.weight = nn.Parameter(value)


def assign_data(layer: nn.Linear, value: torch.Tensor) -> None:
    layer.weight.data = value


def write(layer: nn.Linear, value: torch.Tensor) -> None:
    layer.weight.copy_(value)


@pytest.mark.parametrize("change", [replace, assign_data, write])
def test_a_changed_parameter_is_the_one_that_replayed_calls_use(
    automatic: Session, change: Callable[[nn.Linear, torch.Tensor], None]
) -> None:
    model = deep()
    remote = replayed(model)
    assert automatic.recorder.replays == 2
    value = torch.linspace(-0.5, 0.5, 64).view(8, 8)
    for _ in range(2):
        value = value * 0.9
        change(model[2][0], value.clone())
        change(remote[2][0], value.to("genie"))
        for _ in range(2):
            torch.testing.assert_close(remote(X.to("genie")).cpu(), model(X))
    assert automatic.recorder.replays > 2


def test_parameters_are_no_arguments_of_the_graph(automatic: Session, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    from genie.frontend.replay.backend import Replay

    given = []
    call = Replay.__call__

    def count(self: Replay, *args: object) -> object:
        given.append(sum(isinstance(a, LazyTensor) for a in args))
        return call(self, *args)

    monkeypatch.setattr(Replay, "__call__", count)
    replayed(deep())
    assert given == [1, 1]


def test_tied_parameters_are_one_value(automatic: Session) -> None:
    model = deep()
    for layer in model[1:]:
        layer[0].weight = model[0][0].weight
    remote = copy.deepcopy(model).to("genie")
    for layer in remote[1:]:
        layer[0].weight = remote[0][0].weight
    for _ in range(3):
        torch.testing.assert_close(remote(X.to("genie")).cpu(), model(X))
    assert automatic.recorder.replays == 2
    assert module.state_of(remote).graphs == 1  # type: ignore[union-attr]


@pytest.mark.parametrize("leave", ["moved", "deleted"])
def test_the_graph_keeps_no_value_that_its_module_has_left(automatic: Session, leave: str) -> None:
    remote = replayed(deep())
    values = [weakref.ref(p._h) for p in remote.parameters() if isinstance(p, LazyTensor)]
    assert len(values) == 24
    if leave == "moved":
        remote.cpu()
        torch.testing.assert_close(remote(X), deep()(X))
    else:
        del remote
    gc.collect()
    assert not [v for v in values if v() is not None]
