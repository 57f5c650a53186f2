"""The critical path is the longest chain of waiting, and the printed graph marks it."""

from __future__ import annotations

import pytest
import torch

from genie.srg.critical import NOMINAL, critical_path
from tests.frontend import models
from tests.srg.programs import largest, mlp


def two_chains():  # type: ignore[no-untyped-def]
    def run() -> None:
        x = torch.ones(4, 4).to("genie")
        (x.sin().sin().sin() + x.tanh()).cpu()

    return largest(run)


def test_it_is_the_longest_by_the_seconds_that_are_given() -> None:
    graph = two_chains()
    numbers = {name: [n.number for n in graph.nodes if n.name == name] for name in ("sin", "tanh", "add")}
    seconds = [1.0] * len(graph.nodes)
    assert critical_path(graph, seconds) == (numbers["sin"] + numbers["add"], 4.0)
    seconds[numbers["tanh"][0]] = 3.5
    assert critical_path(graph, seconds) == (numbers["tanh"] + numbers["add"], 4.5)


def test_a_write_in_place_is_waited_for() -> None:
    def run() -> None:
        x = torch.zeros(4, 4, device="genie")
        view = x[1]
        x.add_(1)
        (view * 2).cpu()

    graph = largest(run)
    path, length = critical_path(graph, [2.0 if n.name == "add_" else 1.0 for n in graph.nodes])
    names = [graph.nodes[k].name for k in path]
    assert names[-2:] == ["add_", "mul"] and length == len(path) + 1


def test_times_are_asked_for_all_instructions() -> None:
    with pytest.raises(ValueError, match="0 times for"):
        critical_path(two_chains(), [])


def test_nominal_times_are_a_roofline_and_views_are_free() -> None:
    graph = largest(mlp)
    seconds = NOMINAL.seconds(graph.nodes)
    half = NOMINAL.seconds(graph.nodes, 0.5)
    for node, whole, part in zip(graph.nodes, seconds, half, strict=True):
        work = max((node.cost.flops or 0) / 1e11, node.cost.nbytes / 1e10)
        assert whole == (0 if node.is_view else pytest.approx(work + 1e-6))
        assert part == (0 if node.is_view else pytest.approx(work / 2 + 1e-6))


def test_the_text_folds_equal_blocks_and_marks_the_path() -> None:
    graph = largest(
        lambda: models.gpt2(4).to("genie")(torch.ones(2, 9).long().to("genie"), use_cache=False).logits.cpu()
    )
    lines = str(graph).splitlines()
    (blocks,) = (line for line in lines if "transformer.h.*" in line)
    assert blocks.startswith("  x4 transformer.h.*: ") and "prefill text" in blocks
    path, _ = critical_path(graph, NOMINAL.seconds(graph.nodes))
    assert sum(line.startswith("* ") for line in lines) == len(path) > 30
    assert f"critical path (*) {len(path)} ops" in lines[0]
