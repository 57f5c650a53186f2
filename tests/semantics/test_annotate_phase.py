"""`genie.annotate_phase` wins over evidence, for modules and for blocks; contradictions are told."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import genie
import genie.errors
from genie.srg.graph import Graph, Phase
from tests.frontend import models
from tests.srg.programs import graphs


def towers() -> nn.Module:
    torch.manual_seed(0)
    return nn.ModuleDict({k: nn.Sequential(*(nn.Linear(8, 8) for _ in range(3))) for k in "ab"}).eval()


def run(model: nn.Module) -> torch.Tensor:
    x = torch.ones(2, 8).to("genie") * 2.5
    return model["b"](model["a"](x).tanh()).cpu()


def linears(graph: Graph) -> list[Phase]:
    return [n.phase for n in graph.nodes if n.name == "linear"]


@pytest.fixture
def session():  # type: ignore[no-untyped-def]
    with torch.no_grad(), genie.local() as opened:
        yield opened


DECODE, PREFILL, UNKNOWN = Phase.DECODE, Phase.PREFILL, Phase.UNKNOWN


@pytest.mark.parametrize("before", [True, False], ids=["before moving", "after moving"])
def test_a_module_is_in_the_phase_that_it_is_said_to_be(session, before) -> None:
    model = towers()
    if before:
        genie.annotate_phase(model["a"], "decode")
    model.to("genie")
    if not before:
        genie.annotate_phase(model["a"], "decode")
    run(model)
    graph = graphs(session)[-1]
    assert linears(graph) == [DECODE] * 3 + [UNKNOWN] * 3
    assert {n.phase for n in graph.nodes if n.name == "tanh"} == {UNKNOWN} and not graph.notes


def test_it_holds_for_a_template_that_has_run_already_and_can_be_taken_back(session) -> None:
    model = towers().to("genie")
    session.synchronize()  # what seeding and moving recorded
    seen = []
    for phase in (None, "decode", None, "decode"):
        genie.annotate_phase(model, phase)
        run(model)
        executor = session.executor
        seen.append((len(executor.graphs), linears(list(executor.graphs.values())[-1])))
    # A graph for what is annotated, one for what is not: the later calls look them up.
    assert seen[0][1] == [UNKNOWN] * 6 and seen[1][1] == [DECODE] * 6
    assert [count - seen[0][0] for count, _ in seen] == [0, 1, 1, 1]


def test_the_innermost_module_counts_whichever_was_annotated_first(session) -> None:
    model = towers().to("genie")
    genie.annotate_phase(model["b"], "prefill")
    genie.annotate_phase(model, "decode")
    run(model)
    assert linears(graphs(session)[-1]) == [DECODE] * 3 + [PREFILL] * 3


def test_a_copy_of_an_annotated_module_is_annotated(session) -> None:
    model = towers()
    genie.annotate_phase(model, "decode")
    run(copy.deepcopy(model).to("genie"))
    assert linears(graphs(session)[-1]) == [DECODE] * 6


def test_equal_models_with_other_annotations_have_other_graphs(session) -> None:
    plain, hinted = towers().to("genie"), towers().to("genie")
    genie.annotate_phase(hinted, "decode")
    run(plain)
    run(hinted)
    assert [linears(g) for g in graphs(session) if linears(g)] == [[UNKNOWN] * 6, [DECODE] * 6]


def test_a_block_wins_over_modules_and_the_innermost_block_over_others(session) -> None:
    model = towers().to("genie")
    genie.annotate_phase(model, "decode")
    x = torch.ones(2, 8).to("genie") * 2.5
    with genie.annotate_phase("prefill"):
        x = model["a"](x)
        with genie.annotate_phase("text_encode"):
            x = x.tanh()
    model["b"](x).cpu()
    graph = graphs(session)[-1]
    assert linears(graph) == [PREFILL] * 3 + [DECODE] * 3
    assert [n.phase for n in graph.nodes if n.name == "tanh"] == [Phase.TEXT_ENCODE]


def test_a_block_around_a_function_without_parameters_and_reads_inside_it(session) -> None:
    x = torch.ones(4).to("genie") * 2
    with genie.annotate_phase("decode"):
        assert x.sin().sum().item() == pytest.approx(4 * 0.9093, abs=1e-3)
        y = x.cos()
    assert y.tan().cpu().shape == (4,)
    phases = {n.name: n.phase for g in graphs(session) for n in g.nodes}
    assert {k: phases[k] for k in ("sin", "sum", "cos")} == dict.fromkeys(("sin", "sum", "cos"), DECODE)
    assert phases["tan"] is UNKNOWN and phases["mul"] is UNKNOWN


def test_a_hint_against_the_evidence_wins_and_the_graph_says_so(session) -> None:
    model = models.gpt2()
    genie.annotate_phase(model, "decode")
    model.to("genie")(torch.ones(1, 128).long().to("genie"), use_cache=False).logits.cpu()
    graph = max(graphs(session), key=lambda g: len(g.nodes))
    assert {n.phase for n in graph.nodes if n.cost.flops} == {DECODE}
    (note,) = graph.notes
    assert "decode of the module at the top, though" in note and "prefill by evidence" in note
    assert f"note: {note}" in str(graph).splitlines()
    assert Graph.from_bytes(graph.to_bytes()).notes == [note]


def test_replayed_programs_are_annotated_too() -> None:
    with torch.no_grad(), genie.local(replay=True) as session:
        model = models.bert()
        genie.annotate_phase(model.encoder, "prefill")
        model.to("genie")
        for _ in range(2):
            model(torch.ones(2, 9).long().to("genie")).last_hidden_state.cpu()
        assert session.recorder.replays
        for graph in (g for g in graphs(session) if len(g.nodes) > 20):
            assert {n.phase for n in graph.nodes if n.module.startswith("encoder")} == {PREFILL}
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("call", "remedy"),
    [
        (lambda m: genie.annotate_phase(m, "decoding"), "use one of prefill, decode"),
        (lambda m: genie.annotate_phase(m, "unknown"), "use one of prefill, decode"),
        (lambda m: genie.annotate_phase("prefil"), "use one of prefill, decode"),
        (lambda m: genie.annotate_phase("prefill", "decode"), "give a module first"),
        (lambda m: genie.annotate_phase(torch.ones(2), "decode"), "takes a module or a phase"),
        (lambda m: genie.annotate_phase(nn.GELU(), "decode"), "annotate the module that holds it"),
    ],
)
def test_what_cannot_be_annotated_is_told_with_its_remedy(call, remedy) -> None:
    with pytest.raises(ValueError, match=remedy):
        call(towers())


def test_two_phases_of_one_module_are_an_error_that_names_the_ways_out() -> None:
    model = towers()
    genie.annotate_phase(model, "decode")
    genie.annotate_phase(model, "decode")
    with pytest.raises(ValueError, match=r"'decode' already.*annotate_phase\(module, None\)"):
        genie.annotate_phase(model, "prefill")
    genie.annotate_phase(model, None)
    genie.annotate_phase(model, "prefill")


def test_a_block_needs_a_session() -> None:
    with pytest.raises(genie.errors.SessionClosedError), genie.annotate_phase("decode"):
        pass
