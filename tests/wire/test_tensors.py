"""Specs and tensors, bytes without copies, and memory that is used again."""

from __future__ import annotations

import random

import pytest
import torch

from genie.errors import ProtocolError
from genie.wire.buffers import POOLED_FROM, BlockPool, new_payload
from genie.wire.messages import TensorSpec
from genie.wire.tensors import check_spec, dense_nbytes, is_dense, spec_of, to_wire, unpack


def test_any_order_of_dimensions_is_dense():
    rng = random.Random(0)
    for _ in range(200):
        shape = [rng.randrange(5) for _ in range(rng.randrange(5))]
        tensor = torch.empty(shape).permute(rng.sample(range(len(shape)), len(shape)))
        assert is_dense(tensor.shape, tensor.stride())
        assert dense_nbytes(spec_of(tensor)) == tensor.nbytes


def test_holes_and_overlaps_are_not_dense():
    assert not is_dense([4], [2])
    assert not is_dense([4, 4], [1, 1])
    assert not is_dense([2, 3], [4, 1])


def test_check_spec_accepts_only_what_torch_can_make():
    rng = random.Random(0)
    numbers = [-1, 0, 1, 2, 3, 1000, 2**31, 2**59, 2**62]
    accepted = 0
    for _ in range(2000):
        shape, stride = ([rng.choice(numbers) for _ in range(rng.randrange(4))] for _ in range(2))
        try:
            dtype, nbytes = check_spec(TensorSpec("int16", shape, stride, rng.choice(numbers)))
        except ProtocolError:
            continue
        torch.empty_strided(shape, stride, dtype=dtype, device="meta")
        assert 0 <= nbytes < 2**62
        accepted += 1
    assert accepted > 50


def test_pieces_of_a_payload_have_storages_of_their_own():
    payload = new_payload(3 << 20)
    payload.copy_(torch.arange(3 << 20) % 251)
    half = 3 << 19
    specs = [TensorSpec("uint8", [half], [1]), TensorSpec("uint8", [half], [1])]
    a, b = unpack(payload, specs)
    assert a.untyped_storage().nbytes() == b.untyped_storage().nbytes() == half
    assert torch.equal(torch.cat([a, b]), payload)
    version = b._version
    a.zero_()
    assert b._version == version


def test_a_small_piece_does_not_keep_a_large_payload_alive():
    large = TensorSpec("uint8", [1 << 20], [1])
    payload = new_payload((1 << 20) + 8)
    address = payload.data_ptr()
    big, small = unpack(payload, [large, TensorSpec("int64", [1], [1])])
    assert big.data_ptr() == address
    assert not address <= small.data_ptr() < address + payload.numel()


def test_bytes_on_the_wire_are_the_tensors_own():
    tensor = torch.arange(6.0).reshape(2, 3)
    spec, data, owner = to_wire(tensor.t())
    assert spec == TensorSpec("float32", [3, 2], [1, 3])
    assert owner.data_ptr() == tensor.data_ptr()
    tensor[0, 0] = 5
    assert bytes(data) == tensor.numpy().tobytes()


def test_lazy_conjugates_and_holes_are_made_real():
    z = torch.tensor([1 + 2j, 3 - 4j])
    spec, data, _ = to_wire(z.conj())
    assert torch.equal(torch.frombuffer(bytearray(data), dtype=torch.complex64), z.conj().resolve_conj())
    spec, data, _ = to_wire(torch.arange(10)[::2])
    assert spec == TensorSpec("int64", [5], [1])
    assert len(data) == 40


def test_blocks_are_used_again_when_every_tensor_on_them_is_dead():
    pool = BlockPool(keep_bytes=4 * POOLED_FROM)
    first = pool.empty(POOLED_FROM)
    view, address = first[5:10], first.data_ptr()
    del first
    other = pool.empty(POOLED_FROM)
    assert other.data_ptr() != address
    del view
    again = pool.empty(POOLED_FROM - 100)
    assert again.data_ptr() == address
    assert again.untyped_storage().nbytes() == POOLED_FROM - 100


def test_the_pool_keeps_no_more_than_it_may():
    pool = BlockPool(keep_bytes=2 * POOLED_FROM)
    blocks = [pool.empty(POOLED_FROM) for _ in range(5)]
    del blocks
    assert pool.free_bytes == 2 * POOLED_FROM
    with pytest.raises(MemoryError):
        pool.empty(2**62)
