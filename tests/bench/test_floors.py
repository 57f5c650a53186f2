"""The least time of a request: the closed forms against PyTorch's own counter, and what has none."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from genie.bench.floors import Limits, Step, floor_of, steps_of
from genie.bench.limits import limits_of, measure_limits
from genie.devices import device_slot
from genie.workloads import make_workload


def info(workload, model, profile="smoke", dtype="float32", **params):
    return {
        "workload": workload, "profile": profile, "params": params, "model": {"name": model, "dtype": dtype}
    }  # fmt: skip


def counted(workload):
    """FLOPs as PyTorch counts them, with the whole matrix of attention, and bytes of the weights."""
    model = workload.build_model()
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        workload.run(model, workload.request(0), "cpu")
    return counter.get_total_flops(), sum(p.nbytes for p in model.parameters())


def test_a_prefill_is_what_pytorch_counts_with_half_of_the_attention():
    workload = make_workload("llm_prefill", "smoke")
    flops, weights = counted(workload)
    (step,) = steps_of(info("llm_prefill", "gpt2-2l-256"))
    size, shape = workload.size, workload.size.model
    unseen = 2 * shape.layers * shape.width * size.prompt * (size.prompt - 1) * size.batch
    assert step.flops == flops - unseen
    positions = shape.positions * shape.width * 4
    assert step.nbytes == weights - positions, "one row of the positions' embedding is read for a position"


def test_a_decode_reads_weights_and_cache_again_for_each_token():
    workload = make_workload("llm_decode", "smoke")
    flops, _ = counted(workload)
    steps = steps_of(info("llm_decode", "gpt2-2l-256"))
    size, shape = workload.size, workload.size.model
    assert len(steps) == size.new_tokens
    unseen = 2 * shape.layers * shape.width * size.prompt * (size.prompt - 1)
    assert sum(step.flops for step in steps) == flops - unseen
    cache = workload._lm.kv_bytes_per_token()
    assert steps[1].nbytes == steps[0].nbytes + cache * (size.prompt + 1)
    assert steps[2].nbytes == steps[1].nbytes + cache


def test_more_sequences_share_the_weights():
    one, four = (steps_of(info("llm_decode", "gpt2-2l-256", **p))[1] for p in ({}, {"batch": 4}))
    assert four.flops == 4 * one.flops
    assert one.nbytes < four.nbytes < 2 * one.nbytes


def test_a_resnet_is_what_pytorch_counts():
    flops, weights = counted(make_workload("vision_cnn", "smoke"))
    (step,) = steps_of(info("vision_cnn", "resnet18"))
    assert (step.flops, step.nbytes) == (flops, weights)


def test_clip_is_what_pytorch_counts_with_half_of_the_text_towers_attention():
    workload = make_workload("multimodal_vqa", "smoke")
    flops, weights = counted(workload)
    (step,) = steps_of(info("multimodal_vqa", "clip-2l-128"))
    width, layers = workload.size.model.text_tower[:2]
    tokens, texts = workload.size.text_tokens, workload.size.candidates
    assert step.flops == flops - 2 * layers * width * tokens * (tokens - 1) * texts
    assert step.nbytes < weights


def test_the_microbenchmark_is_its_ops_one_by_one():
    steps = steps_of(info("microbenchmark", "ops"))
    assert len(steps) == len(make_workload("microbenchmark", "smoke").cases)


@pytest.mark.parametrize(
    "other",
    [
        info("llm_prefill", "somebody's model"), info("tiny", "tiny"), info("dtype", "float32"),
        info("llm_prefill", "gpt2-2l-256", "huge"), info("llm_prefill", "gpt2-2l-256", dtype="int8"),
        info("llm_prefill", "gpt2-2l-256", heads=3), info("name", "smoke"),
    ],
)  # fmt: skip
def test_what_is_not_of_this_suite_has_no_floor(other):
    assert steps_of(other) is None


def test_each_step_takes_the_longer_of_computing_and_reading():
    floor = floor_of((Step(4.0, 10.0), Step(1.0, 60.0)), Limits(rate=1.0, bandwidth=10.0, source=""))
    assert (floor.seconds, floor.bound) == (4.0 + 6.0, "memory")


def test_limits_are_measured_here_and_found_again():
    measured = measure_limits(device_slot("cpu", 0), "float32")
    found = limits_of([measured], measured["model"], "float32")
    assert (found.rate, found.bandwidth) == (measured["flops_per_s"], measured["bytes_per_s"])
    assert found.source.startswith("measured in the run (torch.mm of 1024 squared")
    assert 1e8 < found.rate < 1e14
    assert 1e8 < found.bandwidth < 1e13
    assert torch.get_num_threads() >= 1


def test_stated_limits_are_for_known_gpus_where_none_were_measured():
    failed = {"dtype": "float16", "error": "out of memory"}
    stated = limits_of([failed], "NVIDIA H200", "float16")
    assert (stated.bandwidth, stated.source) == (4.8e12, "stated in NVIDIA's data sheet")
    assert limits_of([], "NVIDIA H200", "float64") is None
    assert limits_of([], "AMD EPYC", "float32") is None
