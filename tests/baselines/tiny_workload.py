"""A workload small enough for tests of the peers' pools, importable by their worker processes."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import nn

from genie.workloads.protocol import ModelInfo, Request, Response, Verification


@dataclass(frozen=True)
class TinyWorkload:
    """One linear layer. ``sleep_s`` stretches every request, ``fault`` makes it fail."""

    splittable: bool = True
    rows: int = 8
    width: int = 64
    seed: int = 1
    sleep_s: float = 0.0
    fault: str = ""
    params: dict[str, object] = field(default_factory=dict)

    name: ClassVar[str] = "tiny"
    profile: ClassVar[str] = "smoke"
    dtype: ClassVar[torch.dtype] = torch.float32
    cases: ClassVar[tuple[str, ...]] = ("",)

    def build_model(self) -> nn.Module:
        if self.fault == "build":
            raise ValueError("this model cannot be built")
        torch.manual_seed(os.getpid() if self.fault == "seeding" else self.seed)
        return nn.Linear(self.width, self.width).eval().requires_grad_(False)

    def model_info(self, model: nn.Module) -> ModelInfo:
        checksum = sum(p.double().sum().item() for p in model.parameters())
        params = sum(p.numel() for p in model.parameters())
        return ModelInfo("tiny", params, "float32", "seeded", f"{checksum:.12f}")

    def request(self, index: int, case: str = "") -> Request:
        generator = torch.Generator().manual_seed(index)
        return Request(index, {"x": torch.randn(self.rows, self.width, generator=generator)}, case)

    def run(self, model: nn.Module, request: Request, device: str | torch.device) -> Response:
        start = time.perf_counter()
        if self.fault == "run":
            raise ValueError("this request cannot be run")
        time.sleep(self.sleep_s)
        with torch.inference_mode():
            y = model(request.inputs["x"].to(device)).cpu()
        return Response({"y": y}, [time.perf_counter() - start])

    def split(self, request: Request, parts: int) -> list[Request]:
        return [Request(request.index, {"x": x}, request.case) for x in request.inputs["x"].chunk(parts)]

    def merge(self, responses: list[Response]) -> Response:
        return Response({"y": torch.cat([r.outputs["y"] for r in responses])}, responses[0].token_s)

    def verify(
        self, model: nn.Module, request: Request, response: Response, reference: Response
    ) -> Verification:
        error = (response.outputs["y"] - reference.outputs["y"]).abs().max().item()
        return Verification(error < 1e-5, "allclose", error)

    def state_bytes(self, request: Request) -> int:
        return 0
