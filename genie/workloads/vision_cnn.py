"""vision_cnn: a stream of image micro-batches through a ResNet."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import nn
from torchvision.models import get_model

from genie.errors import ConfigError
from genie.workloads import batches, seeding, weights
from genie.workloads.profiles import VisionSize, changed, get_profile
from genie.workloads.protocol import ModelInfo, Request, Response, Verification
from genie.workloads.verify import verify_tensors
from genie.workloads.weights import Checkpoint

#: file with the ResNet's state_dict in a directory of checkpoints
STATE_DICT_FILE = "model.pt"


@dataclass(frozen=True)
class VisionCnn:
    profile: str
    size: VisionSize
    weights: str = "seeded"

    name: ClassVar[str] = "vision_cnn"
    cases: ClassVar[tuple[str, ...]] = ("",)

    @property
    def dtype(self) -> torch.dtype:
        return get_profile(self.profile).dtype

    @property
    def params(self) -> dict[str, object]:
        return changed(self.size, get_profile(self.profile).vision_cnn)

    @property
    def splittable(self) -> bool:
        return self.size.micro_batches > 1

    @property
    def checkpoint(self) -> Checkpoint | None:
        checkpoint = weights.resolve(self.weights, self.name, f"torchvision/{self.size.model}")
        if checkpoint is not None and not checkpoint.is_directory and self.weights != "pretrained":
            raise ConfigError(
                f"{self.name}: {self.weights!r} is neither an existing directory nor 'pretrained' "
                "(torchvision's own weights); there is no hub of ResNets to ask"
            )
        return checkpoint

    def build_model(self) -> nn.Module:
        checkpoint = self.checkpoint
        if checkpoint is None:
            model = weights.seeded(lambda: get_model(self.size.model, weights=None), self.dtype)
        elif checkpoint.is_directory:
            model = self._from_state_dict(Path(checkpoint.location) / STATE_DICT_FILE)
        else:
            model = self._from_torchvision()
        if self.size.channels_last:
            model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return model

    def _from_state_dict(self, file: Path) -> nn.Module:
        model = get_model(self.size.model, weights=None)
        try:
            model.load_state_dict(torch.load(file, map_location="cpu", weights_only=True), strict=True)
        except (OSError, RuntimeError) as error:
            raise ConfigError(
                f"cannot load {file}: {error}; save the state_dict of torchvision's {self.size.model} there"
            ) from error
        return weights.freeze(model.to(self.dtype))

    def _from_torchvision(self) -> nn.Module:
        try:
            model = get_model(self.size.model, weights="DEFAULT")
        except (OSError, RuntimeError) as error:
            raise ConfigError(
                f"cannot download torchvision's weights of {self.size.model}: {error}; connect this machine, "
                f"or name a directory that holds {STATE_DICT_FILE}"
            ) from error
        return weights.freeze(model.to(self.dtype))

    def model_info(self, model: nn.Module) -> ModelInfo:
        return weights.model_info(model, self.size.model, self.dtype, self.checkpoint)

    def request(self, index: int, case: str = "") -> Request:
        size = self.size
        shape = (size.micro_batches, size.micro_batch, 3, size.px, size.px)
        return Request(
            index, {"images": seeding.images(shape, self.dtype, seeding.generator(self.name, index, case))}
        )

    def run(self, model: nn.Module, request: Request, device: str | torch.device) -> Response:
        """Feeds the stream without waiting for any result, and reads all of them back at its end."""
        with torch.no_grad():
            logits = []
            for images in request.inputs["images"]:
                batch = images.to(device)
                if self.size.channels_last:
                    batch = batch.to(memory_format=torch.channels_last)
                logits.append(model(batch))
            return Response({"logits": torch.cat(logits).cpu()})

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
