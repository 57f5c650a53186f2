"""Branches are what computes side by side and shares nothing computed; a chain has none."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

import genie
from genie.srg.graph import Graph
from tests.frontend import models
from tests.srg.programs import graphs, largest


def tower(width: int = 32, layers: int = 3) -> nn.Sequential:
    return nn.Sequential(*(m for _ in range(layers) for m in (nn.Linear(width, width), nn.Tanh())))


def branches(graph: Graph, name: str = "linear") -> list[int | None]:
    return [n.branch for n in graph.nodes if n.name == name]


def recorded(run: Callable[[Callable[[torch.Tensor], torch.Tensor]], torch.Tensor]) -> Graph:
    torch.manual_seed(0)
    return largest(lambda: run(lambda t: t.to("genie")).cpu())


def ones(put: Callable, *shape: int) -> torch.Tensor:
    return put(torch.ones(shape)) * 2.5


def test_two_towers_that_meet_are_branches_and_what_follows_is_none() -> None:
    def run(put: Callable) -> torch.Tensor:
        a, b, head = tower().to("genie"), tower().to("genie"), tower().to("genie")
        x = ones(put, 4, 32)  # read by both: preparation
        return head(a(x) + b(x.sin()))  # the sine is read by one tower alone

    graph = recorded(run)
    assert branches(graph) == [0] * 3 + [1] * 3 + [None] * 3
    assert (
        branches(graph, "mul") == [None]
        and branches(graph, "sin") == [1]
        and branches(graph, "add") == [None]
    )


def test_towers_of_clip_are_branches_with_their_own_preparation() -> None:
    def run() -> None:
        ids, pixels = torch.ones(3, 10).long().to("genie"), torch.ones(2, 3, 32, 32).to("genie")
        models.clip().to("genie")(input_ids=ids, pixel_values=pixels).logits_per_image.cpu()

    graph = largest(run)
    assert branches(graph, "conv2d") == [0]
    assert {n.branch for n in graph.nodes if n.module.startswith("vision_model")} == {0}
    assert {n.branch for n in graph.nodes if n.module.startswith("text_model")} == {1}
    assert branches(graph, "matmul") == [None]


@pytest.mark.parametrize("count", [2, 8])
def test_micro_batches_through_one_model_are_branches(count: int) -> None:
    def run() -> None:
        model = models.resnet18().to("genie")
        batch = torch.ones(count, 3, 32, 32).to("genie") * 0.5
        torch.cat([model(part) for part in batch.split(1)]).cpu()

    graph = largest(run)
    assert branches(graph, "conv2d") == [k for k in range(count) for _ in range(20)]
    assert branches(graph, "cat") == [None] and branches(graph, "mul") == [None]


def test_two_requests_that_decode_in_one_window_are_branches() -> None:
    with torch.no_grad(), genie.local() as session:
        model = models.llama().to("genie")
        ids = torch.ones(1, 5).long().to("genie")
        caches = [model(ids, use_cache=True).past_key_values for _ in range(2)]
        session.synchronize()
        steps = [model(ids[:, :1], past_key_values=c).logits for c in caches]
        torch.cat(steps).cpu()
        graph = graphs(session)[-1]
    found = branches(graph)
    assert found == [0] * (len(found) // 2) + [1] * (len(found) // 2)


@pytest.mark.parametrize(
    "build", [models.gpt2, models.llama, models.bert, models.resnet18], ids=lambda b: b.__name__
)
def test_a_chain_has_none(build: Callable) -> None:
    def run() -> None:
        image = build is models.resnet18
        x = torch.ones(2, 3, 32, 32) if image else torch.ones(2, 9).long()
        out = build().to("genie")(x.to("genie"))
        (out if image else out[0]).cpu()

    assert {n.branch for n in largest(run).nodes} == {None}


def test_memory_that_one_writes_to_and_the_other_reads_joins_them() -> None:
    def run(put: Callable, in_place: bool) -> torch.Tensor:
        a, b = tower().to("genie"), tower().to("genie")
        shared = put(torch.zeros(4, 32)) * 1.5
        x, y = ones(put, 4, 32), ones(put, 4, 32)
        first = a(x)
        if in_place:
            shared.add_(first)
        return torch.cat([first, b(y + shared)])

    assert branches(recorded(lambda put: run(put, False))) == [1] * 3 + [0] * 3  # b's input is made first
    assert set(branches(recorded(lambda put: run(put, True)))) == {None}


def test_a_write_to_what_another_has_read_is_where_they_meet() -> None:
    def run(put: Callable) -> torch.Tensor:
        a, b = tower().to("genie"), tower().to("genie")
        shared = put(torch.zeros(4, 32)) * 1.5
        first = a(ones(put, 4, 32) + 1) + shared
        second = b(ones(put, 4, 32))
        shared.add_(second)
        return torch.cat([first, second, shared.tanh()])

    graph = recorded(run)
    assert branches(graph) == [0] * 3 + [1] * 3
    assert branches(graph, "add_") == [None] and branches(graph, "tanh")[-1] is None


def test_a_small_side_is_no_branch() -> None:
    def run(put: Callable) -> torch.Tensor:
        big, small = tower(256, 8).to("genie"), tower(4, 2).to("genie")
        return big(ones(put, 64, 256)) + small(ones(put, 1, 4)).sum()

    assert set(branches(recorded(run))) == {None}
