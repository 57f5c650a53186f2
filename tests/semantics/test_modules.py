"""Weights keep their names whatever becomes of their module, and instructions are their modules'."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import nn

import genie
from tests.frontend import models
from tests.srg.programs import graphs, largest


@pytest.fixture
def session():  # type: ignore[no-untyped-def]
    with torch.no_grad(), genie.local() as opened:
        yield opened


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        self.register_buffer("scale", torch.ones(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.body:
            x = layer(x).relu() * self.scale
        return x


def names(session, model: nn.Module) -> set[str]:  # type: ignore[no-untyped-def]
    """Of the weights in the graph of a call."""
    known = len(session.executor.graphs)
    model(torch.ones(2, 8).to("genie") * 2.5).cpu()
    found = list(session.executor.graphs.values())[known:] or graphs(session)
    return {e.weight for g in found for e in g.externals if e.weight}


ALL = {"scale", *(f"body.{k}.{n}" for k in range(2) for n in ("weight", "bias"))}


def test_parameters_and_buffers_have_their_qualified_names(session) -> None:
    assert names(session, Net().to("genie")) == ALL


def test_names_survive_other_dtypes_and_loading(session) -> None:
    model = Net().to("genie")
    state = {k: v.clone() for k, v in Net().state_dict().items()}
    model.load_state_dict({k: v.to("genie") for k, v in state.items()}, assign=True)
    assert names(session, model) == ALL
    model.double().float()
    session.synchronize()
    assert names(session, model) == ALL


def test_a_model_made_on_the_device_has_names_once_it_has_loaded_its_state(session) -> None:
    with torch.device("genie"):
        model = Net()
    assert names(session, model) == set()
    model.load_state_dict(Net().state_dict())
    assert names(session, nn.Sequential(model, nn.Tanh())) == ALL


def test_a_part_that_moves_alone_keeps_its_place_in_the_whole(session) -> None:
    model = Net()
    model.body[1].to("genie")
    model.to("genie")
    model.body[0].to("genie")
    assert names(session, model) == ALL


def test_an_instruction_is_the_module_s_of_the_weight_that_it_reads_or_lies_in_between() -> None:
    def run() -> None:
        ids = torch.ones(2, 9).long().to("genie")
        models.gpt2(1).to("genie")(ids, use_cache=False).logits.cpu()

    graph = largest(run)
    where: dict[str, set[str | None]] = {}
    for node in graph.nodes:
        where.setdefault(node.name, set()).add(node.module)
    assert where["scaled_dot_product_attention"] == {"transformer.h.0.attn"}
    assert where["embedding"] == {"transformer.wte", "transformer.wpe"}
    assert where["linear"] == {"lm_head"}  # the very weight that wte looks up
    assert where["layer_norm"] == {"transformer.h.0.ln_1", "transformer.h.0.ln_2", "transformer.ln_f"}


def test_two_models_in_one_graph_are_told_apart(session) -> None:
    def run() -> None:
        first, second, other = Net().to("genie"), Net().to("genie"), nn.Linear(8, 8).to("genie")
        x = torch.ones(2, 8).to("genie") * 2.5
        (first(x) + second(x) + other(x)).cpu()

    with torch.no_grad():
        run()
    found = {n.module for n in graphs(session)[-1].nodes if n.name == "linear"}
    assert found == {"Net.body.0", "Net.body.1", "Net#2.body.0", "Net#2.body.1", "Linear"}


def test_names_of_what_has_gone_are_forgotten(session) -> None:
    known = session.recorder.weight_names
    for _ in range(200):
        Net().to("genie")
    gc.collect()
    Net().to("genie")
    assert len(known._owners) < 600 and len(known._roots) < 10
