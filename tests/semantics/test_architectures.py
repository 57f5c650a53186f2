"""What is said of real architectures is right, recorded op by op or replayed; a model of another kind is
"unknown", and runs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import genie
from genie.srg.cost import COMPUTE
from genie.srg.graph import Graph, Residency
from tests.semantics.architectures import ARCHITECTURES, Architecture
from tests.srg.programs import graphs


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield
    torch._dynamo.reset()


def check(kind: Architecture, found: list[Graph]) -> None:
    arithmetic = [n for g in found for n in g.nodes if n.name in COMPUTE]
    assert {n.phase for n in arithmetic if n.cost.flops} == kind.phases
    assert {n.modality for n in arithmetic if n.cost.flops} == kind.modalities
    nodes = [n for g in found for n in g.nodes]
    assert kind.modules <= {n.module for n in nodes}
    stages = {n.stage for n in nodes} - {None}
    assert len(stages) == kind.stages
    assert {n.branch for n in nodes} - {None} == set(range(kind.branches))
    weights = [e for g in found for e in g.externals if e.weight is not None]
    assert weights and {e.residency for e in weights} == {Residency.PERSISTENT_WEIGHT}


def call(kind: Architecture, times: int) -> list[torch.Tensor]:
    model = kind.build().to("genie")
    return [kind.call(model).cpu() for _ in range(times)]


@pytest.mark.parametrize("kind", ARCHITECTURES, ids=lambda a: a.name)
def test_recorded(kind: Architecture) -> None:
    with genie.local() as session:
        call(kind, 1)
        check(kind, graphs(session))


#: one of each kind, since compiling takes seconds: a decoder, one with an encoder, a CNN, two towers, others
KINDS = ("gpt2", "t5-without-cache", "resnet", "clip", "mlp", "message passing")
REPLAYED = [a for a in ARCHITECTURES if a.name in KINDS]


@pytest.mark.parametrize("kind", REPLAYED, ids=lambda a: a.name)
def test_replayed(kind: Architecture) -> None:
    with genie.local(replay=True) as session:
        first, second = call(kind, 2)
        assert torch.equal(first, second)
        assert session.recorder.replays
        check(kind, graphs(session))
