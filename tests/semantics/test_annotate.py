"""What the recognizers say of real architectures, and that they say nothing of others."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

import genie
from genie.semantics.annotate import annotate
from genie.semantics.kv_cache import growths
from genie.srg.cost import COMPUTE
from genie.srg.graph import Graph, Modality, Phase, Residency
from tests.frontend import models
from tests.srg.programs import graphs, graphs_of, largest

KV = Residency.STATEFUL_KV_CACHE


def generate(model: torch.nn.Module, **options: object) -> None:
    prompt = torch.arange(5, 11)[None].to("genie")
    options = {"do_sample": False, "pad_token_id": 0, "max_new_tokens": 3, "min_new_tokens": 3} | options
    model.generate(prompt, attention_mask=torch.ones_like(prompt), **options).cpu()


def phases(graph: Graph) -> Counter:
    """Of the arithmetic: matmuls, attention, convolutions."""
    return Counter(n.phase for n in graph.nodes if n.name in COMPUTE)


@pytest.mark.parametrize("build", [models.gpt2, models.llama], ids=["gpt2", "llama"])
@pytest.mark.parametrize("cache", [None, "static"], ids=["dynamic", "static"])
def test_prefill_and_decode_are_told_apart_and_the_kv_cache_is_found(build, cache) -> None:
    found = graphs_of(lambda: generate(build().to("genie"), cache_implementation=cache))
    prefill, *decodes = found
    assert set(phases(prefill)) == {Phase.PREFILL}
    assert decodes and all(set(phases(d)) == {Phase.DECODE} for d in decodes)
    assert len(growths(prefill)) == 2 * 2 and {g.queries for g in growths(prefill)} == {6}
    for decode in decodes:  # keys and values of both layers, and nothing else
        caches = [e for e in decode.externals if e.residency is KV]
        assert sorted(e.outputs[0] for e in caches) == sorted(g.cache for g in growths(decode))
        assert len(caches) == 4 and {len(e.specs[0].shape) for e in caches} == {4}


def test_beam_search_keeps_reordered_caches() -> None:
    decode = graphs_of(lambda: generate(models.gpt2().to("genie"), num_beams=2))[1]
    assert set(phases(decode)) == {Phase.DECODE}
    assert sum(n.name == "index_select" and n.residency is KV for n in decode.nodes) == 4


def test_a_prompt_in_chunks_over_a_static_cache_is_prefill_though_its_template_is_that_of_decode() -> None:
    from torch.nn.functional import scaled_dot_product_attention as attend

    with torch.no_grad(), genie.local() as session:
        cache = torch.zeros(1, 2, 16, 4, device="genie")
        weight = torch.nn.Linear(4, 4).to("genie")

        def step(start: int, count: int) -> None:
            x = weight(torch.ones(1, 2, count, 4, device="genie"))
            cache.index_copy_(2, torch.arange(start, start + count).to("genie"), x)
            attend(x, cache, cache).cpu()

        session.synchronize()
        for start, count in ((0, 3), (3, 3), (6, 1), (7, 1)):
            step(start, count)
        found = [g for g in graphs(session) if growths(g)]
        assert [set(phases(g)) for g in found] == [{Phase.PREFILL}, {Phase.DECODE}]
        assert found[0].digest == found[1].digest


def test_a_cache_written_by_slices_is_found() -> None:
    with torch.no_grad(), genie.local() as session:
        cache = torch.zeros(1, 2, 16, 4, device="genie")
        session.synchronize()
        cache[:, :, 3:4] = torch.ones(1, 2, 1, 4, device="genie") * 2
        torch.nn.functional.scaled_dot_product_attention(cache[:, :, 3:4], cache, cache).cpu()
        (growth,) = growths(graphs(session)[-1])
        assert (growth.dim, growth.queries) == (2, 1)


def test_a_forward_without_cache_is_a_prefill() -> None:
    model = models.gpt2()
    graph = largest(
        lambda: model.to("genie")(
            torch.ones(2, 9).long().to("genie"), use_cache=False, logits_to_keep=1
        ).logits.cpu()
    )
    assert set(phases(graph)) == {Phase.PREFILL} and not growths(graph)


def test_t5_decodes_against_both_caches_after_its_encoder_has_filled_one() -> None:
    ids = torch.ones(1, 7).long()
    first, *rest = graphs_of(
        lambda: models.t5().to("genie").generate(ids.to("genie"), max_new_tokens=3, do_sample=False).cpu()
    )
    # The keys and values of the encoded text, in both layers, are a prefill.
    assert set(phases(first)) == {Phase.TEXT_ENCODE, Phase.PREFILL, Phase.DECODE}
    assert phases(first)[Phase.PREFILL] == 4
    assert all(set(phases(g)) == {Phase.DECODE} for g in rest)
    for step in rest:  # of each layer: two that grow, two that are only read
        assert sum(e.residency is KV for e in step.externals) == 2 * 4


def test_parameters_and_running_statistics_are_persistent_and_other_inputs_are_not() -> None:
    model = models.resnet18()
    count = sum(1 for _ in model.parameters()) + sum("running" in name for name, _ in model.named_buffers())
    graph = largest(lambda: model.to("genie")(torch.ones(2, 3, 32, 32).to("genie")).cpu())
    held = Counter(e.residency for e in graph.externals)
    assert held == {Residency.PERSISTENT_WEIGHT: count, Residency.EXTERNAL_INPUT: 1}


def test_what_dies_is_ephemeral_and_what_is_read_or_kept_leaves() -> None:
    def run() -> None:
        x = torch.ones(4).to("genie")
        kept = (x + 1) * 2
        kept.tanh().cpu()

    graph = largest(run)
    assert [(n.name, n.residency) for n in graph.nodes if n.name in ("add", "mul", "tanh")] == [
        ("add", Residency.EPHEMERAL_ACTIVATION),
        ("mul", Residency.EXTERNAL_OUTPUT),
        ("tanh", Residency.EXTERNAL_OUTPUT),
    ]


def test_resnet_is_vision_in_five_stages() -> None:
    graph = largest(lambda: models.resnet18().to("genie")(torch.ones(2, 3, 32, 32).to("genie")).cpu())
    convolutions = [n for n in graph.nodes if n.name == "conv2d"]
    assert set(phases(graph)) == {Phase.VISION_ENCODE}
    assert {n.modality for n in convolutions} == {Modality.VISION}
    assert Counter(n.stage for n in convolutions) == {0: 1, 1: 4, 2: 5, 3: 5, 4: 5}


def test_clip_has_a_vision_tower_and_a_text_tower_that_meet() -> None:
    graph = largest(
        lambda: (
            models.clip()
            .to("genie")(
                input_ids=torch.ones(3, 10).long().to("genie"),
                pixel_values=torch.ones(2, 3, 32, 32).to("genie"),
            )
            .logits_per_image.cpu()
        )
    )
    attention = Counter(n.modality for n in graph.nodes if n.name == "scaled_dot_product_attention")
    assert attention == {Modality.VISION: 2, Modality.TEXT: 2}
    embeddings = Counter(n.modality for n in graph.nodes if n.name == "embedding")
    assert embeddings == {Modality.VISION: 1, Modality.TEXT: 2}  # one holds the positions of patches
    assert [n for n in graph.nodes if n.leaves][-1].modality is Modality.MULTIMODAL
    assert {n.phase for n in graph.nodes if n.modality is Modality.TEXT} == {Phase.TEXT_ENCODE}
    encoded = {n.phase for n in graph.nodes if n.modality is Modality.VISION and n.name in COMPUTE}
    assert encoded == {Phase.VISION_ENCODE}


def test_bert_encodes_text() -> None:
    graph = largest(lambda: models.bert().to("genie")(torch.ones(2, 9).long().to("genie"))[0].cpu())
    assert set(phases(graph)) == {Phase.TEXT_ENCODE}
    assert {n.modality for n in graph.nodes if n.name in COMPUTE} == {Modality.TEXT}


def test_a_model_of_another_kind_stays_unknown() -> None:
    model = torch.nn.Sequential(torch.nn.Conv1d(7, 8, 3), torch.nn.Flatten(), torch.nn.Linear(8 * 6, 4))
    history = torch.zeros(1, 2, 4)

    def run() -> None:
        signal = model.to("genie")(torch.ones(1, 7, 8).to("genie"))
        kept = torch.cat([history.to("genie"), signal.view(1, 1, 4)], 1)  # a history, but no KV cache
        kept.sum().cpu()

    for graph in graphs_of(run):
        assert {(n.phase, n.modality, n.stage) for n in graph.nodes} == {
            (Phase.UNKNOWN, Modality.UNKNOWN, None)
        }
        assert not any(n.residency is KV for n in (*graph.nodes, *graph.externals))


def test_annotation_leaves_the_graph_it_was_given_alone_and_the_first_recognizer_wins() -> None:
    graph = largest(lambda: models.resnet18().to("genie")(torch.ones(2, 3, 32, 32).to("genie")).cpu())

    def all_decode(g: Graph) -> None:
        for node in g.nodes:
            node.phase = Phase.DECODE

    from genie.semantics import convolution

    bare = annotate(graph, [])
    changed = annotate(bare, [all_decode, convolution.recognize])
    assert bare == graph and {n.phase for n in changed.nodes} == {Phase.DECODE}
