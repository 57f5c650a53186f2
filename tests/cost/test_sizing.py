"""Buffers suffice for every probe of each type of device, exceed its caches, and keep to a limit."""

from __future__ import annotations

from math import prod

import pytest
import torch

from genie.cost import calibrate, programs
from genie.cost.sizing import (
    GUESS,
    MAX_CALLS,
    aligned,
    buffers,
    calls,
    largest_weight,
    sizing,
)

KINDS = [(kind, dtype) for kind, dtypes in calibrate.DTYPES.items() for dtype in dtypes]


@pytest.mark.parametrize(("kind", "dtype"), KINDS)
def test_every_probe_has_room(kind, dtype):
    probes = calibrate.default_probes(kind)
    found = sizing(probes, kind, dtype.itemsize)
    assert found.probes == tuple(probes)
    assert not found.limited
    for probe in probes:
        largest = largest_weight(probe)
        shared = [n for n in (*probe.inputs, *probe.weights) if n != largest and n not in probe.ids]
        shapes = probe.inputs | probe.weights
        assert sum(aligned(prod(shapes[n])) for n in shared) <= found.buffers.activations
        if largest:
            assert prod(probe.weights[largest]) <= found.buffers.pools[found.buffers.pool(probe)][0]


@pytest.mark.parametrize(("kind", "dtype"), KINDS)
def test_large_weights_come_from_memory(kind, dtype):
    cold = GUESS[kind].cold_bytes
    for elements, count in sizing(calibrate.default_probes(kind), kind, dtype.itemsize).buffers.pools:
        assert count == MAX_CALLS or count * elements * dtype.itemsize >= cold
        assert count == 1 or (count - 1) * elements * dtype.itemsize < cold


@pytest.mark.parametrize(("kind", "dtype"), KINDS)
def test_the_whole_stays_bounded(kind, dtype):
    """In memory, in calls that a client records, and in seconds by the guessed rates."""
    probes = calibrate.default_probes(kind)
    found = sizing(probes, kind, dtype.itemsize).buffers
    assert found.nbytes(dtype.itemsize) < {"cpu": 600e6, "cuda": 2e9}[kind]
    numbers = [calls(p, kind, dtype, found) for p in probes]
    assert all(1 <= n <= MAX_CALLS for n in numbers)
    assert sum(numbers) < 15_000
    guess = GUESS[kind]
    rate = guess.half_rate if dtype.itemsize < 4 else guess.rate
    assert sum(n * (guess.launch_s + p.flops / rate) for n, p in zip(numbers, probes, strict=True)) < 2.0


@pytest.mark.parametrize("limit", [1 << 18, 1 << 20, 1 << 24, 100 << 20, 500 << 20])
@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_a_limit_is_kept_by_leaving_out_the_largest(kind, limit):
    probes = calibrate.default_probes(kind)
    found = sizing(probes, kind, 4, limit)
    assert found.limited
    assert found.probes
    assert found.buffers.nbytes(4) <= 0.75 * limit
    assert list(found.probes) == [p for p in probes if p in found.probes]
    dropped = [p.elements for p in probes if p not in found.probes]
    assert max(p.elements for p in found.probes) <= min(dropped, default=float("inf"))


def test_a_limit_that_is_large_enough_changes_nothing():
    probes = calibrate.default_probes("cpu")
    whole = sizing(probes, "cpu", 4)
    assert sizing(probes, "cpu", 4, whole.needed_bytes(4) + 2) == whole
    assert sizing(probes, "cpu", 4, whole.needed_bytes(4) - 2).limited


def test_weights_of_like_sizes_share_buffers():
    probes = [programs.linear(1, 100, 1000), programs.linear(1, 100, 600), programs.linear(1, 10, 10)]
    assert buffers(probes, 4, 10**6).pools == ((16384, 16), (100_000, 3))


def test_sixteen_bits_are_expected_to_be_faster():
    probe = programs.linear(4096, 1024, 4096)
    found = sizing([probe], "cuda", 4).buffers
    assert calls(probe, "cuda", torch.bfloat16, found) > calls(probe, "cuda", torch.float32, found)
