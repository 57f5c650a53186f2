"""A decoder small enough that a test of what engines do takes no time."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention as attention


class Decoder(nn.Module):
    """Two layers of attention with caches that grow by ``torch.cat``, and greedy choice of the next token."""

    def __init__(self, seed: int = 0, groups: int = 2, width: int = 32) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.groups = groups
        self.embed = nn.Embedding(64, width)
        self.q, self.k, self.v = (
            nn.ModuleList(nn.Linear(width, n * 8) for _ in range(2)) for n in (4, groups, groups)
        )
        self.out = nn.ModuleList(nn.Linear(32, width) for _ in range(2))
        self.head = nn.Linear(width, 64)
        for weight in self.parameters():
            weight.data.mul_(2)  # so that what it saw before decides what it says next
        self.eval()

    def forward(self, ids, pasts=None, mask=None):
        """``ids`` (batch, positions), ``pasts`` [key, value] * 2, (batch, groups, positions, 8) each. Gives
        the last logits (batch, 64), and the caches."""
        batch, n = ids.shape
        x, caches = self.embed(ids), []
        for layer in range(2):
            q, k, v = (m[layer](x).view(batch, n, -1, 8).transpose(1, 2) for m in (self.q, self.k, self.v))
            if pasts is not None:
                k, v = torch.cat([pasts[2 * layer], k], dim=-2), torch.cat([pasts[2 * layer + 1], v], dim=-2)
            caches += [k, v]
            seen = attention(q, k, v, attn_mask=mask, is_causal=n > 1, enable_gqa=self.groups < 4)
            x = x + self.out[layer](seen.transpose(1, 2).reshape(batch, n, 32))
        return self.head(x[:, -1]), caches


def choose(logits: torch.Tensor, caches: list) -> tuple[torch.Tensor, list]:
    return logits.argmax(-1, keepdim=True), caches


def decode(model, token, caches, steps: int, act=None):
    """``steps`` greedy ones from where (token, caches) stand. ``act(step, token, caches)`` may return other
    (token, caches). Gives the logits (batch, steps, 64) on the CPU, and (token, caches) to go on from."""
    read = []
    for step in range(steps):
        logits, caches = model(token, caches)
        token, caches = choose(logits, caches)
        read.append(logits.cpu())
        if act is not None:
            token, caches = act(step, token, caches) or (token, caches)
    return torch.stack(read, dim=1), (token, caches)


def generate(model, ids, steps: int = 24, act=None) -> torch.Tensor:
    """Logits after the prompt ``ids``, (batch, steps, 64)."""
    return decode(model, *choose(*model(ids)), steps, act)[0]
