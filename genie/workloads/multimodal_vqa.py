"""multimodal_vqa: CLIP-style question answering: an image tower, a text tower over question + candidate
answer, and the candidates ranked for each image. The towers share nothing until the last product.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import CLIPConfig, CLIPModel

from genie.errors import ConfigError
from genie.workloads import batches, seeding, weights
from genie.workloads.profiles import VqaSize, changed, get_profile
from genie.workloads.protocol import ModelInfo, Request, Response, Verification
from genie.workloads.verify import verify_ranking, verify_tensors
from genie.workloads.weights import Checkpoint


@dataclass(frozen=True)
class MultimodalVqa:
    profile: str
    size: VqaSize
    weights: str = "seeded"

    name: ClassVar[str] = "multimodal_vqa"
    cases: ClassVar[tuple[str, ...]] = ("",)

    @property
    def dtype(self) -> torch.dtype:
        return get_profile(self.profile).dtype

    @property
    def params(self) -> dict[str, object]:
        return changed(self.size, get_profile(self.profile).multimodal_vqa)

    @property
    def splittable(self) -> bool:
        return min(self.size.images, self.size.candidates) > 1

    @property
    def checkpoint(self) -> Checkpoint | None:
        return weights.resolve(self.weights, self.name, self.size.model.hub)

    def config(self) -> Any:
        checkpoint = self.checkpoint
        if checkpoint is not None:
            return weights.load_config(CLIPConfig, checkpoint)
        shape = self.size.model
        names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
        image_tower, text_tower = (
            dict(zip(names, tower, strict=True)) for tower in (shape.image_tower, shape.text_tower)
        )
        special = {"bos_token_id": shape.vocab - 2, "eos_token_id": shape.vocab - 1}
        return CLIPConfig(
            vision_config={**image_tower, "image_size": shape.image_px, "patch_size": shape.patch_px},
            text_config={
                **text_tower,
                **special,
                "pad_token_id": shape.vocab - 1,
                "vocab_size": shape.vocab,
                "max_position_embeddings": shape.positions,
            },
            projection_dim=shape.projection,
        )

    def build_model(self) -> nn.Module:
        checkpoint = self.checkpoint
        if checkpoint is not None:
            return weights.load_transformers(CLIPModel, checkpoint, self.dtype)
        return weights.seeded(lambda: CLIPModel(self.config()), self.dtype)

    def model_info(self, model: nn.Module) -> ModelInfo:
        return weights.model_info(model, self.size.model.name, self.dtype, self.checkpoint)

    def request(self, index: int, case: str = "") -> Request:
        """``input_ids`` (candidates, tokens): begin, the question, an answer, end, padding."""
        size, config = self.size, self.config()
        if size.text_tokens > config.text_config.max_position_embeddings or size.text_tokens < 4:
            raise ConfigError(
                f"{self.name}: text_tokens={size.text_tokens} must lie between 4 and the text tower's "
                f"{config.text_config.max_position_embeddings} positions"
            )
        source = seeding.generator(self.name, index, case)
        px = config.vision_config.image_size
        images = seeding.images((size.images, 3, px, px), self.dtype, source)
        # CLIP's begin and end ids are its last two. Configs written before transformers 4.31 say 2 for
        # the end, and such models look for the highest id instead.
        begin, end = config.text_config.vocab_size - 2, config.text_config.vocab_size - 1
        if config.text_config.eos_token_id != 2:
            begin, end = config.text_config.bos_token_id, config.text_config.eos_token_id
        ids = torch.full((size.candidates, size.text_tokens), end)
        question = seeding.token_ids((size.text_tokens // 2 - 1,), config.text_config.vocab_size - 2, source)
        ids[:, 0] = begin
        ids[:, 1 : 1 + len(question)] = question
        first = 1 + len(question)
        longest = size.text_tokens - first - 1
        # Answers differ in length, so that the batch has the padding that a real one has.
        lengths = 1 + torch.randint(0, longest, (size.candidates,), generator=source)
        lengths[0] = longest
        mask = torch.zeros_like(ids)
        for row, length in enumerate(lengths.tolist()):
            answer = seeding.token_ids((length,), config.text_config.vocab_size - 2, source)
            ids[row, first : first + length] = answer
            mask[row, : first + length + 1] = 1
        return Request(index, {"pixel_values": images, "input_ids": ids, "attention_mask": mask})

    def run(self, model: nn.Module, request: Request, device: str | torch.device) -> Response:
        with torch.no_grad():
            inputs = {name: tensor.to(device) for name, tensor in request.inputs.items()}
            clip: Any = model
            image = clip.vision_model(pixel_values=inputs["pixel_values"]).pooler_output
            image_embeds = nn.functional.normalize(clip.visual_projection(image), dim=-1)
            text = clip.text_model(
                input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]
            ).pooler_output
            text_embeds = nn.functional.normalize(clip.text_projection(text), dim=-1)
            scale = clip.logit_scale.exp()
            logits = scale * image_embeds @ text_embeds.t()
            outputs = {
                "image_embeds": image_embeds,
                "text_embeds": text_embeds,
                "logit_scale": scale,
                "logits_per_image": logits,
                "ranking": logits.argsort(dim=-1, descending=True),
            }
            return Response({name: tensor.cpu() for name, tensor in outputs.items()})

    def split(self, request: Request, parts: int) -> list[Request]:
        """Cuts the images and the texts each into ``parts``."""
        return batches.split_inputs(request, parts)

    def merge(self, responses: list[Response]) -> Response:
        """Joins the embeddings and scores every image against every text, which no part could do."""
        image_embeds = batches.joined(responses, "image_embeds")
        text_embeds = batches.joined(responses, "text_embeds")
        scale = responses[0].outputs["logit_scale"]
        logits = scale * image_embeds @ text_embeds.t()
        return Response(
            {
                "image_embeds": image_embeds,
                "text_embeds": text_embeds,
                "logit_scale": scale,
                "logits_per_image": logits,
                "ranking": logits.argsort(dim=-1, descending=True),
            }
        )

    def verify(
        self, model: nn.Module, request: Request, response: Response, reference: Response
    ) -> Verification:
        expected = {name: tensor for name, tensor in reference.outputs.items() if name != "ranking"}
        verdict = verify_tensors(response.outputs, expected, self.dtype)
        if not verdict.ok:
            return verdict
        ranked = verify_ranking(
            response.outputs.get("ranking"), reference.outputs["logits_per_image"], self.dtype
        )
        return verdict if ranked.ok else ranked

    def state_bytes(self, request: Request) -> int:
        return 0
