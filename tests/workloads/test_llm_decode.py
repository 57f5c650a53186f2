"""Greedy decoding: its tokens, its clock, its state and its judge."""

import pytest
import torch

from genie.errors import ConfigError
from genie.workloads import Response, make_workload
from genie.workloads.llm import end_of_text_ids
from genie.workloads.llm_decode import _step_marks
from genie.workloads.verify import verify_tokens


def test_one_increasing_mark_per_token(smoke):
    workload, _, _, response = smoke["llm_decode"]
    assert len(response.token_s) == workload.size.new_tokens
    assert response.token_s == sorted(set(response.token_s))
    assert response.token_s[0] > 0
    assert response.outputs["ids"].shape == (1, workload.size.prompt + workload.size.new_tokens)


def test_marks_leave_the_model_as_it_was_also_when_nested_or_failing(smoke):
    _, model, _, _ = smoke["llm_decode"]
    assert "prepare_inputs_for_generation" not in vars(model)
    with _step_marks(model) as outer:
        wrapped = model.prepare_inputs_for_generation
        with _step_marks(model) as inner:
            model.prepare_inputs_for_generation(torch.zeros(1, 3, dtype=torch.long))
        assert model.prepare_inputs_for_generation is wrapped
    assert (len(outer), len(inner)) == (1, 1)
    with pytest.raises(RuntimeError, match="broke"), _step_marks(model):
        raise RuntimeError("broke")
    assert "prepare_inputs_for_generation" not in vars(model)


def test_wrong_tokens_are_caught(smoke):
    workload, model, request, response = smoke["llm_decode"]
    ids = response.outputs["ids"]
    corrupted = ids.clone()
    corrupted[0, -3] += 1
    verdict = workload.verify(model, request, Response({"ids": corrupted}), response)
    assert not verdict.ok
    assert "1 of 8 generated ids differ; the first is token 5" in verdict.detail
    dropped = ids.clone()
    dropped[:, :16] = ids[:, 8:]
    verdict = workload.verify(model, request, Response({"ids": dropped}), response)
    assert "begin with the prompt" in verdict.detail
    verdict = workload.verify(model, request, Response({"ids": ids[:, 16:]}), response)
    assert "shape" in verdict.detail


def test_fp16_tokens_are_judged_by_teacher_forcing(smoke):
    _, model, request, response = smoke["llm_decode"]
    prompt, ids = request.inputs["input_ids"], response.outputs["ids"]
    never = end_of_text_ids(model)

    def judge(returned):
        # A reference that flipped elsewhere must not matter: pass one that agrees with nothing.
        return verify_tokens(model, prompt, returned, torch.zeros_like(ids), torch.float16, never)

    assert judge(ids).ok
    assert judge(ids).max_abs_err == 0.0
    corrupted = ids.clone()
    corrupted[0, -3] = (corrupted[0, -3] + 1) % 8000
    assert "below the maximum" in judge(corrupted).detail
    stopped = ids.clone()
    stopped[0, -1] = never[0]
    assert "end-of-text" in judge(stopped).detail
    outside = ids.clone()
    outside[0, -1] = 8192
    assert "vocabulary" in judge(outside).detail


def test_decoding_is_neither_stuck_nor_near_a_tie(smoke):
    """Smallest gap between the two best logits over 20 requests: 1e-3 to 2e-3 where logits have a
    standard deviation of 0.8; fp32 noise is 1000 times smaller, so equality of ids is a fair demand."""
    workload, model, _, _ = smoke["llm_decode"]
    eos = list(end_of_text_ids(model))
    smallest, distinct = 1.0, 0
    for index in range(20):
        ids = workload.run(model, workload.request(index), "cpu").outputs["ids"]
        with torch.no_grad():
            logits = model(ids[:, :-1], logits_to_keep=8).logits
        logits[..., eos] = -torch.inf
        best = logits.topk(2).values
        smallest = min(smallest, float((best[..., 0] - best[..., 1]).min()))
        distinct += len(set(ids[0, 16:].tolist()))
    assert smallest > 1e-4
    assert distinct >= 20 * 6, "of 8 tokens per request"


def test_state_bytes_is_what_the_cache_really_holds():
    workload = make_workload("llm_decode", "smoke", batch=2, new_tokens=5)
    model, request = workload.build_model(), workload.request(0)
    held = []

    def measure(module, args, kwargs, output):
        layers = output.past_key_values.layers
        held.append(sum(layer.keys.nbytes + layer.values.nbytes for layer in layers))

    hook = model.register_forward_hook(measure, with_kwargs=True)
    workload.run(model, request, "cpu")
    hook.remove()
    assert len(held) == 5
    # After the last stopping test nobody needs the cache again.
    assert workload.state_bytes(request) == sum(held[:-1])


def test_a_prompt_that_does_not_fit_is_refused():
    with pytest.raises(ConfigError, match="256 positions"):
        make_workload("llm_decode", "smoke", prompt=250).request(0)
