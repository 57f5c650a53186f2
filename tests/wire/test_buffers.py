"""Memory that is made once and lent again and again."""

from __future__ import annotations

import torch

from genie.wire.buffers import SMALLEST_BLOCK, BoundedPool


def pool(limit: int, made: list[int]) -> BoundedPool:
    def new_block(nbytes: int) -> torch.Tensor:
        made.append(nbytes)
        return torch.empty(nbytes, dtype=torch.uint8)

    return BoundedPool(limit, new_block)


def test_a_block_returns_when_every_tensor_on_it_is_dead():
    made: list[int] = []
    blocks = pool(1 << 20, made)
    first = blocks.empty(100_000)
    assert first.numel() == first.untyped_storage().nbytes() == 100_000
    view, address = first[5:10], first.data_ptr()
    del first
    assert blocks.empty(100_000).data_ptr() != address
    del view
    again = [blocks.empty(90_000), blocks.empty(90_000)]
    assert address in [t.data_ptr() for t in again]
    assert made == [1 << 17, 1 << 17]


def test_the_limit_holds_and_what_is_lent_out_is_not_there():
    made: list[int] = []
    blocks = pool(4 * SMALLEST_BLOCK, made)
    lent = [blocks.empty(SMALLEST_BLOCK) for _ in range(4)]
    assert blocks.empty(1) is None
    assert blocks.made_bytes == sum(made) == 4 * SMALLEST_BLOCK
    lent.pop()
    assert blocks.empty(1) is not None
    assert blocks.empty(5 * SMALLEST_BLOCK) is None


def test_a_large_block_serves_a_small_payload_only_when_no_more_can_be_made():
    made: list[int] = []
    blocks = pool(17 * SMALLEST_BLOCK, made)
    large = blocks.empty(16 * SMALLEST_BLOCK)
    address = large.data_ptr()
    del large
    small = blocks.empty(10)
    assert small.data_ptr() != address
    other = blocks.empty(10)
    assert other.data_ptr() == address
    assert made == [16 * SMALLEST_BLOCK, SMALLEST_BLOCK]


def test_memory_that_cannot_be_had_is_asked_for_once(caplog):
    asked = []

    def refuse(nbytes: int) -> torch.Tensor:
        asked.append(nbytes)
        raise RuntimeError("no memory can be pinned")

    blocks = BoundedPool(1 << 30, refuse)
    assert blocks.empty(100) is None
    assert blocks.empty(100) is None
    assert len(asked) == 1
    assert "no memory can be pinned" in caplog.text
