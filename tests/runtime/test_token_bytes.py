"""What a decode step costs on the wire, beside its token ids."""

from __future__ import annotations

import itertools

import pytest
import torch

import genie
import genie.torchvision_compat
from tests.server.programs import TOKEN


@pytest.mark.parametrize("layers", [12, 48])
def test_a_decoded_token_costs_little_on_the_wire(server, layers):
    """GPT-2 at tiny width: both directions together, beside the token ids."""
    from transformers import GPT2Config, GPT2LMHeadModel, LogitsProcessor

    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=layers, n_embd=16, n_head=2, n_positions=128, vocab_size=64, bos_token_id=0, eos_token_id=63
    )
    model = GPT2LMHeadModel(config).eval()
    marks = []
    with genie.connect(server.address, TOKEN) as session, torch.no_grad():
        link = session.executor.link

        class Mark(LogitsProcessor):
            def __call__(self, input_ids, scores):
                connection = link.connection
                marks.append((connection.bytes_out, connection.bytes_in, connection.round_trips))
                return scores

        model = model.to("genie")
        for request in range(2):
            link.begin(f"{request:016d}")
            marks.clear()
            ids = torch.arange(16).view(1, 16).to("genie")
            model.generate(
                ids,
                max_new_tokens=20,
                min_new_tokens=20,
                do_sample=False,
                pad_token_id=0,
                logits_processor=[Mark()],
            ).cpu()
        receipts = list(link.usage.receipts)
    tokens = [[b - a for a, b in zip(*pair, strict=True)] for pair in itertools.pairwise(marks)]
    steady = tokens[8:]
    assert all(trips == 1 for *_, trips in steady)
    assert max(out + into for out, into, _ in steady) <= 2048
    assert {r.nonce for r in receipts} == {f"{1:016d}"}
    assert sum(r.ops for r in receipts) > 20 * 30 * layers
