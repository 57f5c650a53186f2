"""What every workload promises, at smoke size."""

import hashlib
import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from genie.errors import ConfigError
from genie.workloads import PROFILES, WORKLOADS, Response, make_workload

EVERY = pytest.mark.parametrize("name", WORKLOADS)

OTHER_PROCESS = """
import json, torch
from tests.workloads.test_workloads import fingerprints
torch.set_num_threads(2)
print(json.dumps(fingerprints()))
"""


def fingerprints():
    """By workload: hash of the weights, and hash of the tensors of two requests."""
    prints = {}
    for name in WORKLOADS:
        workload = make_workload(name, "smoke")
        digest = hashlib.sha256()
        for index in (0, 5):
            for tensor in workload.request(index, workload.cases[-1]).inputs.values():
                digest.update(tensor.numpy().tobytes())
        prints[name] = [workload.model_info(workload.build_model()).weights_sha256, digest.hexdigest()]
    return prints


def test_weights_and_requests_are_the_same_in_another_process_with_more_threads():
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", OTHER_PROCESS]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=root)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == fingerprints()


@EVERY
def test_travels_by_pickle_and_serves_as_a_key(name):
    workload = make_workload(name, "smoke")
    copy = pickle.loads(pickle.dumps(workload))
    assert copy == workload
    assert {workload: 1}[copy] == 1
    assert copy.cases == workload.cases


@EVERY
def test_model_is_frozen_for_inference(smoke, name):
    workload, model, _, _ = smoke[name]
    assert not model.training
    assert all(not p.requires_grad and p.dtype == workload.dtype for p in model.parameters())
    assert all(p.device.type == "cpu" and torch.isfinite(p).all() for p in model.parameters())


@EVERY
def test_another_index_gives_other_inputs_and_other_outputs(smoke, name):
    workload, model, request, response = smoke[name]
    again = workload.request(0, workload.cases[0])
    assert all(torch.equal(tensor, again.inputs[key]) for key, tensor in request.inputs.items())
    other = workload.request(1, workload.cases[0])
    assert other.index == 1
    verdict = workload.verify(model, request, workload.run(model, other, "cpu"), response)
    assert not verdict.ok
    assert verdict.detail


@EVERY
def test_starts_and_ends_in_cpu_tensors_and_verifies_against_itself(smoke, name):
    workload, model, request, response = smoke[name]
    assert all(tensor.device.type == "cpu" for tensor in request.inputs.values())
    assert all(t.device.type == "cpu" and not t.requires_grad for t in response.outputs.values())
    verdict = workload.verify(model, request, workload.run(model, request, "cpu"), response)
    assert verdict.ok, verdict.detail
    assert verdict.kind == ("tokens" if name == "llm_decode" else "allclose")


@EVERY
@pytest.mark.parametrize("parts", [1, 2, 3, 64])
def test_split_and_merged_equals_unsplit(name, parts):
    workload = make_workload(name, "smoke", **({"batch": 3} if name == "llm_decode" else {}))
    model = workload.build_model()
    request = workload.request(0, workload.cases[0])
    whole = workload.run(model, request, "cpu")
    pieces = workload.split(request, parts)
    assert 1 <= len(pieces) <= parts
    assert len(pieces) > 1 or parts == 1 or not workload.splittable
    assert all(len(tensor) > 0 for piece in pieces for tensor in piece.inputs.values())
    merged = workload.merge([workload.run(model, piece, "cpu") for piece in pieces])
    assert set(merged.outputs) == set(whole.outputs)
    assert len(merged.token_s) == len(whole.token_s)
    verdict = workload.verify(model, request, merged, whole)
    assert verdict.ok, verdict.detail


@EVERY
def test_swapped_weights_are_noticed(smoke, name):
    workload, model, _, _ = smoke[name]
    # An op with weights; a pure function has none to swap.
    case = next((case for case in workload.cases if case.startswith("linear")), "")
    request = workload.request(0, case)
    reference = workload.run(model, request, "cpu")
    swapped = workload.build_model()
    honest = workload.model_info(model).weights_sha256
    assert workload.model_info(swapped).weights_sha256 == honest
    matrix = next(p for key, p in swapped.named_parameters() if p.dim() > 1 and case in key)
    matrix.copy_(matrix.flip(0))
    assert workload.model_info(swapped).weights_sha256 != honest
    assert not workload.verify(model, request, workload.run(swapped, request, "cpu"), reference).ok


@EVERY
def test_malformed_responses_are_refused(smoke, name):
    workload, model, request, response = smoke[name]
    key = next(iter(response.outputs))
    good = response.outputs[key]
    bad = {
        "missing": {},
        "dtype": {key: good.to(torch.float64)},
        "shape": {key: good[:-1]},
    }
    if good.is_floating_point():
        broken = good.clone()
        broken.view(-1)[0] = torch.nan
        bad["NaN or Inf"] = {key: broken}
    for word, change in bad.items():
        outputs = change if word == "missing" else {**response.outputs, **change}
        verdict = workload.verify(model, request, Response(outputs), response)
        assert not verdict.ok
        assert word in verdict.detail


def test_unknown_names_are_refused_with_the_valid_ones():
    with pytest.raises(ConfigError, match="llm_decode, llm_prefill, vision_cnn"):
        make_workload("llm", "smoke")
    with pytest.raises(ConfigError, match="smoke, cpu, gpu"):
        make_workload("llm_decode", "tiny")
    with pytest.raises(ConfigError, match="prompt, new_tokens, batch"):
        make_workload("llm_decode", "smoke", size=4)
    with pytest.raises(ConfigError, match="positive integer"):
        make_workload("llm_decode", "smoke", batch=0)
    with pytest.raises(ConfigError, match="takes none"):
        make_workload("microbenchmark", "smoke", batch=2)


def test_params_name_only_what_differs_from_the_default():
    assert make_workload("llm_decode", "smoke").params == {}
    assert make_workload("llm_decode", "smoke", batch=4).params == {"batch": 4}
    assert make_workload("llm_decode", "smoke", batch=1).params == {}
    assert tuple(PROFILES) == ("smoke", "cpu", "gpu")
