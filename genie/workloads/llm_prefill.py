"""llm_prefill: a batch of long prompts through the model, logits of the last token of each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from genie.workloads import batches
from genie.workloads.llm import CausalLm
from genie.workloads.profiles import PrefillSize, changed, get_profile
from genie.workloads.protocol import ModelInfo, Request, Response, Verification
from genie.workloads.verify import verify_tensors


@dataclass(frozen=True)
class LlmPrefill:
    profile: str
    size: PrefillSize
    weights: str = "seeded"

    name: ClassVar[str] = "llm_prefill"
    cases: ClassVar[tuple[str, ...]] = ("",)

    @property
    def dtype(self) -> torch.dtype:
        return get_profile(self.profile).dtype

    @property
    def params(self) -> dict[str, object]:
        return changed(self.size, get_profile(self.profile).llm_prefill)

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
        return Request(index, {"input_ids": self._lm.prompts(index, size.batch, size.prompt, size.prompt)})

    def run(self, model: nn.Module, request: Request, device: str | torch.device) -> Response:
        """No attention mask: the prompts are equally long. No cache: nobody goes on from here."""
        with torch.no_grad():
            ids = request.inputs["input_ids"].to(device)
            logits = model(input_ids=ids, use_cache=False, logits_to_keep=1).logits[:, -1]
            return Response({"logits": logits.cpu()})

    def split(self, request: Request, parts: int) -> list[Request]:
        return batches.split_inputs(request, parts)

    def merge(self, responses: list[Response]) -> Response:
        return Response({"logits": batches.joined(responses, "logits")})

    def verify(
        self, model: nn.Module, request: Request, response: Response, reference: Response
    ) -> Verification:
        return verify_tensors(response.outputs, reference.outputs, self.dtype)

    def state_bytes(self, request: Request) -> int:
        return 0
