"""Single ops: stable cases, honest FLOPs and bytes, every case runs."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from genie.errors import ConfigError
from genie.workloads import PROFILES, make_workload

OPS = [
    "matmul",
    "linear",
    "conv2d",
    "attention",
    "norm",
    "softmax",
    "elementwise",
    "embedding",
    "reduction",
    "cat",
]


@pytest.mark.parametrize("profile", PROFILES)
def test_cases_are_op_by_op_from_small_to_large_with_one_held_out_size(profile):
    cases = make_workload("microbenchmark", profile).op_cases
    assert list(dict.fromkeys(case.op for case in cases)) == OPS
    for op in OPS:
        own = [case for case in cases if case.op == op]
        assert [case.bytes for case in own] == sorted({case.bytes for case in own})
        assert [case.held_out for case in own].count(True) == 1
        assert not own[0].held_out
        assert all(case.name == f"{op}/{case.sizes[0]}" for case in own)


def test_every_case_runs_verifies_and_moves_the_bytes_it_declares(smoke):
    workload, model, _, _ = smoke["microbenchmark"]
    for case in workload.op_cases:
        request = workload.request(3, case.name)
        response = workload.run(model, request, "cpu")
        assert workload.verify(model, request, response, response).ok
        if case.op in ("elementwise", "embedding"):
            continue  # an intermediate result, or only some rows of the table
        weights = sum(p.nbytes for key, p in model.named_parameters() if key.startswith(case.name + "."))
        tensors = [*request.inputs.values(), *response.outputs.values()]
        assert case.bytes == weights + sum(tensor.nbytes for tensor in tensors), case.name


def test_flops_of_matmul_like_ops_agree_with_pytorchs_own_counter(smoke):
    workload, model, _, _ = smoke["microbenchmark"]
    for case in workload.op_cases:
        if case.op not in ("matmul", "linear", "conv2d"):
            continue
        with FlopCounterMode(display=False) as counter:
            workload.run(model, workload.request(0, case.name), "cpu")
        assert counter.get_total_flops() == case.flops, case.name


def test_a_request_must_name_a_case():
    workload = make_workload("microbenchmark", "smoke")
    with pytest.raises(ConfigError, match="matmul/64"):
        workload.request(0)
    with pytest.raises(ConfigError, match="no checkpoint"):
        make_workload("microbenchmark", "smoke", weights="pretrained")
    assert torch.equal(workload.request(1, "cat/8").inputs["x"], workload.request(1, "cat/8").inputs["x"])
