"""What the two GPT-2 workloads share: the model, and prompts that fit it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from genie.errors import ConfigError
from genie.workloads import seeding, weights
from genie.workloads.profiles import Gpt2Shape
from genie.workloads.protocol import ModelInfo
from genie.workloads.weights import Checkpoint


@dataclass(frozen=True)
class CausalLm:
    """A decoder-only language model: GPT-2 of ``shape``, or the checkpoint that ``weights`` names."""

    shape: Gpt2Shape
    weights: str
    workload: str
    dtype: torch.dtype

    @property
    def checkpoint(self) -> Checkpoint | None:
        return weights.resolve(self.weights, self.workload, self.shape.hub)

    def config(self) -> Any:
        checkpoint = self.checkpoint
        if checkpoint is not None:
            return weights.load_config(AutoConfig, checkpoint)
        shape = self.shape
        return GPT2Config(
            vocab_size=shape.vocab,
            n_positions=shape.positions,
            n_embd=shape.width,
            n_layer=shape.layers,
            n_head=shape.heads,
            bos_token_id=shape.vocab - 1,
            eos_token_id=shape.vocab - 1,
        )

    def build(self) -> nn.Module:
        checkpoint = self.checkpoint
        if checkpoint is not None:
            return weights.load_transformers(AutoModelForCausalLM, checkpoint, self.dtype)
        return weights.seeded(lambda: GPT2LMHeadModel(self.config()), self.dtype)

    def info(self, model: nn.Module) -> ModelInfo:
        return weights.model_info(model, self.shape.name, self.dtype, self.checkpoint)

    def prompts(self, index: int, batch: int, length: int, total: int) -> torch.Tensor:
        """Random token ids (batch, length); the end-of-text id, which is the last, never occurs.

        ``total`` is the longest sequence that will be run.
        """
        config = self.config()
        if total > config.max_position_embeddings:
            raise ConfigError(
                f"{self.workload}: {total} tokens do not fit the model's {config.max_position_embeddings} "
                "positions; lower prompt or new_tokens, or use a larger checkpoint"
            )
        source = seeding.generator(self.workload, index, "")
        return seeding.token_ids((batch, length), config.vocab_size - 1, source)

    def kv_bytes_per_token(self) -> int:
        """Bytes that one position of one sequence adds to the KV cache, over all layers."""
        config = self.config()
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return 2 * config.num_hidden_layers * heads * head_dim * self.dtype.itemsize


def end_of_text_ids(model: nn.Module) -> tuple[int, ...]:
    """The ids at which ``generate()`` stops; () for a model without any."""
    eos: Any = model.generation_config.eos_token_id  # type: ignore[union-attr]
    if eos is None:
        return ()
    return (int(eos),) if isinstance(eos, int) else tuple(int(token) for token in eos)
