"""llm_decode: greedy ``generate()`` of N tokens with a KV cache.

The program is Hugging Face's own, unmodified. End-of-text handling stays on, so the host reads one
stopping test per token, and ``min_new_tokens`` keeps the number of tokens fixed.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from genie.workloads import batches
from genie.workloads.llm import CausalLm, end_of_text_ids
from genie.workloads.profiles import DecodeSize, changed, get_profile
from genie.workloads.protocol import ModelInfo, Request, Response, Verification
from genie.workloads.verify import verify_tokens


@dataclass(frozen=True)
class LlmDecode:
    profile: str
    size: DecodeSize
    weights: str = "seeded"

    name: ClassVar[str] = "llm_decode"
    cases: ClassVar[tuple[str, ...]] = ("",)

    @property
    def dtype(self) -> torch.dtype:
        return get_profile(self.profile).dtype

    @property
    def params(self) -> dict[str, object]:
        return changed(self.size, get_profile(self.profile).llm_decode)

    @property
    def splittable(self) -> bool:
        return self.size.batch > 1

    @property
    def _lm(self) -> CausalLm:
        return CausalLm(self.size.model, self.weights, self.name, self.dtype)

    def build_model(self) -> nn.Module:
        return self._lm.build()

    def model_info(self, model: nn.Module) -> ModelInfo:
        return self._lm.info(model)

    def request(self, index: int, case: str = "") -> Request:
        size = self.size
        ids = self._lm.prompts(index, size.batch, size.prompt, size.prompt + size.new_tokens)
        return Request(index, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})

    def run(self, model: nn.Module, request: Request, device: str | torch.device) -> Response:
        start = time.perf_counter()
        eos = end_of_text_ids(model)
        with _step_marks(model) as marks:
            ids = model.generate(  # type: ignore[operator]
                request.inputs["input_ids"].to(device),
                attention_mask=request.inputs["attention_mask"].to(device),
                max_new_tokens=self.size.new_tokens,
                min_new_tokens=self.size.new_tokens,
                do_sample=False,
                use_cache=True,
                pad_token_id=eos[0] if eos else 0,
            ).cpu()
        known = [*marks[1:], time.perf_counter()]
        return Response({"ids": ids}, [mark - start for mark in known])

    def split(self, request: Request, parts: int) -> list[Request]:
        return batches.split_inputs(request, parts)

    def merge(self, responses: list[Response]) -> Response:
        """The k-th token of a split batch is known when its last part knows it."""
        times = [max(parts) for parts in zip(*(response.token_s for response in responses), strict=True)]
        return Response({"ids": batches.joined(responses, "ids")}, times)

    def verify(
        self, model: nn.Module, request: Request, response: Response, reference: Response
    ) -> Verification:
        return verify_tokens(
            model,
            request.inputs["input_ids"],
            response.outputs.get("ids"),
            reference.outputs["ids"],
            self.dtype,
            never=end_of_text_ids(model),
        )

    def state_bytes(self, request: Request) -> int:
        """KV-cache bytes summed over the stopping tests after which decoding goes on.

        At the k-th test (k = 1..N) the cache holds P + k - 1 positions. After the N-th nothing uses it
        again, so a runtime must both fetch and send it back only N - 1 times:
        bytes_per_position x batch x sum over k = 1..N-1 of (P + k - 1)
        = bytes_per_position x batch x ((N - 1) P + (N - 1)(N - 2) / 2).
        """
        batch, prompt = request.inputs["input_ids"].shape
        steps = self.size.new_tokens - 1
        positions = steps * prompt + steps * (steps - 1) // 2
        return self._lm.kv_bytes_per_token() * batch * positions


@contextmanager
def _step_marks(model: Any) -> Iterator[list[float]]:
    """Collects the time at which each step of ``generate()`` begins.

    A step begins with ``prepare_inputs_for_generation``, right after the host has read the previous
    token's stopping test: so the k-th mark tells when token k was known, without a sync of our own
    (which a lazy device would pay for). The model is put back as it was, also when nested.
    """
    marks: list[float] = []
    prepare = model.prepare_inputs_for_generation
    name = "prepare_inputs_for_generation"
    overridden = model.__dict__.get(name)

    @functools.wraps(prepare)  # transformers inspects its signature
    def marked(*args: Any, **kwargs: Any) -> Any:
        marks.append(time.perf_counter())
        return prepare(*args, **kwargs)

    model.__dict__[name] = marked
    try:
        yield marks
    finally:
        if overridden is None:
            del model.__dict__[name]
        else:
            model.__dict__[name] = overridden
