"""Is a response right? All tolerances of the suite are stated here, once.

A tensor passes when ``|x - ref| <= atol * rms(ref) + rtol * |ref|`` holds for every element. ``atol`` is
in units of the reference's root mean square, so one number serves logits, embeddings and sums alike.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from genie.workloads.protocol import Verification


@dataclass(frozen=True)
class Tolerance:
    rtol: float
    atol: float
    #: a returned token's teacher-forced logit may be this far below the maximum, in units of the
    #: standard deviation of that position's logits; None means that ids must be equal
    token_gap: float | None


# Measured on seeded weights, as the largest error in units of the output's RMS. fp32, another thread
# count or batch: 5e-6 for ResNet-50, less for the others; 1e-4 leaves room for GPU kernels. fp16 against
# fp32: 0.04 for GPT-2 124M, 0.02 for CLIP ViT-B/32 and ResNet-152; 0.1 leaves room for 48 layers. bf16
# has 8 times fp16's rounding error. Outputs of two different requests differ by 1 to 1.5 RMS.
TOLERANCES = {
    torch.float32: Tolerance(rtol=1e-3, atol=1e-4, token_gap=None),
    torch.float16: Tolerance(rtol=2e-2, atol=0.1, token_gap=0.1),
    torch.bfloat16: Tolerance(rtol=8e-2, atol=0.4, token_gap=0.4),
}


def _wrong_form(name: str, actual: torch.Tensor | None, expected: torch.Tensor) -> str:
    """Why ``actual`` cannot even be compared with ``expected``, or ""."""
    if actual is None:
        return f"output {name!r} is missing"
    if actual.device.type != "cpu":
        return f"output {name!r} is on {actual.device}, not in CPU memory"
    if actual.dtype != expected.dtype:
        return f"output {name!r} has dtype {actual.dtype}, expected {expected.dtype}"
    if actual.shape != expected.shape:
        return f"output {name!r} has shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    return ""


def verify_tensors(
    outputs: dict[str, torch.Tensor], reference: dict[str, torch.Tensor], dtype: torch.dtype
) -> Verification:
    """Compares every floating-point tensor of ``reference``; ``dtype`` is what the model computed in."""
    tolerance = TOLERANCES[dtype]
    worst = 0.0
    for name, expected in reference.items():
        actual = outputs.get(name)
        if problem := _wrong_form(name, actual, expected):
            return Verification(False, "allclose", None, problem)
        assert actual is not None
        if not torch.isfinite(expected).all():
            return Verification(False, "allclose", None, f"the reference's {name!r} has NaN or Inf")
        if not torch.isfinite(actual).all():
            return Verification(False, "allclose", None, f"output {name!r} has NaN or Inf")
        ref = expected.float()
        error = (actual.float() - ref).abs()
        rms = float(ref.square().mean().sqrt())
        allowed = ref.abs().mul(tolerance.rtol).add(tolerance.atol * rms)
        worst = max(worst, float(error.max()))
        if (bad := int((error > allowed).sum())) > 0:
            return Verification(
                False,
                "allclose",
                worst,
                f"output {name!r}: {bad} of {error.numel()} elements are off by up to {worst:.3g} "
                f"(RMS {rms:.3g}, rtol {tolerance.rtol}, atol {tolerance.atol} x RMS)",
            )
    return Verification(True, "allclose", worst)


def verify_ranking(
    ranking: torch.Tensor | None, reference_logits: torch.Tensor, dtype: torch.dtype
) -> Verification:
    """``ranking[i]`` must order ``reference_logits[i]`` downwards, up to swaps of near-ties."""
    expected = reference_logits.argsort(dim=-1, descending=True)
    if problem := _wrong_form("ranking", ranking, expected):
        return Verification(False, "allclose", None, problem)
    assert ranking is not None
    if not torch.equal(ranking.sort(dim=-1).values, expected.sort(dim=-1).values):
        return Verification(False, "allclose", None, "ranking is not a permutation of the candidates")
    tolerance = TOLERANCES[dtype]
    logits = reference_logits.float()
    ordered = logits.gather(-1, ranking)
    rise = (ordered[:, 1:] - ordered[:, :-1]).clamp(min=0)
    # Two logits may each be off by the tolerance.
    allowed = 2 * (tolerance.atol * logits.square().mean().sqrt() + tolerance.rtol * ordered[:, 1:].abs())
    worst = float(rise.max()) if rise.numel() else 0.0
    if bool((rise > allowed).any()):
        return Verification(
            False, "allclose", worst, f"ranking puts a candidate above one whose logit is {worst:.3g} higher"
        )
    return Verification(True, "allclose", worst)


def verify_tokens(
    model: nn.Module,
    prompt: torch.Tensor,
    ids: torch.Tensor | None,
    reference_ids: torch.Tensor,
    dtype: torch.dtype,
    never: tuple[int, ...] = (),
) -> Verification:
    """Judges greedy ``ids`` (batch, prompt + new). fp32: equal to the reference's. fp16 and bf16: each
    id's logit, from ``model`` teacher-forced on ``ids``, is within the tolerance of the maximum.

    ``never`` are ids that the decoding suppressed at every step (the end-of-text token).
    """
    if problem := _wrong_form("ids", ids, reference_ids):
        return Verification(False, "tokens", None, problem)
    assert ids is not None
    length = prompt.shape[1]
    if not torch.equal(ids[:, :length], prompt):
        return Verification(False, "tokens", None, "the returned ids do not begin with the prompt")
    gap = TOLERANCES[dtype].token_gap
    if gap is None:
        different = (ids != reference_ids).nonzero()
        if len(different):
            row, column = different[0].tolist()
            return Verification(
                False,
                "tokens",
                None,
                f"{len(different)} of {ids[:, length:].numel()} generated ids differ; the first is token "
                f"{column - length} of sequence {row}: {int(ids[row, column])}, "
                f"expected {int(reference_ids[row, column])}",
            )
        return Verification(True, "tokens", None)
    return _teacher_forced(model, ids, length, gap, never)


def _teacher_forced(
    model: nn.Module, ids: torch.Tensor, prompt_length: int, gap: float, never: tuple[int, ...]
) -> Verification:
    vocab = int(model.config.vocab_size)  # type: ignore[union-attr, arg-type]
    if int(ids.min()) < 0 or int(ids.max()) >= vocab:
        return Verification(False, "tokens", None, f"a returned id lies outside the vocabulary of {vocab}")
    new = ids[:, prompt_length:]
    if any(bool((new == token).any()) for token in never):
        return Verification(False, "tokens", None, "an end-of-text id was generated, though suppressed")
    device = next(model.parameters()).device
    with torch.no_grad():
        logits = model(input_ids=ids[:, :-1].to(device), use_cache=False, logits_to_keep=new.shape[1]).logits
    logits = logits.float().cpu()
    if not torch.isfinite(logits).all():
        return Verification(False, "tokens", None, "the teacher-forced logits have NaN or Inf")
    spread = logits.std(dim=-1)
    logits[..., list(never)] = -torch.inf
    shortfall = logits.max(dim=-1).values - logits.gather(-1, new[..., None]).squeeze(-1)
    worst = float(shortfall.max())
    if (bad := int((shortfall > gap * spread).sum())) > 0:
        return Verification(
            False,
            "tokens",
            worst,
            f"{bad} of {new.numel()} generated ids have a logit up to {worst:.3g} below the maximum "
            f"(allowed: {gap} standard deviations, here about {gap * float(spread.mean()):.3g})",
        )
    return Verification(True, "tokens", worst)
