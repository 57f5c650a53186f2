"""How often a probe is repeated in one program, and from which buffers its operands are taken: arithmetic.

A server's memory limit may be less than all probes need. Then weights are read from fewer buffers, and
after that the largest probes are left out, until the rest fits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch

from genie.cost.programs import Probe

#: calls of one op in a program: with two nodes each, below what an executor hands over by itself
MAX_CALLS = 60
#: what one program is to take: much more than the clock's and the program's own cost
PROGRAM_S = 2e-3
#: the same where each call reads other weights, from memory
COLD_PROGRAM_S = 6e-3
#: of a pool: weights of less share its buffers
_LEAST_WEIGHT = 1 << 14
_MOST_PATTERN = 1 << 17
#: part of a server's limit that buffers may take; what else a session holds is small
_BUDGET = 0.75


@dataclass(frozen=True)
class Guess:
    """Of a type of device, before anything is known. ``rate`` in FLOP/s (``half_rate``: of 16-bit dtypes),
    ``bandwidth`` in bytes/s. ``cold_bytes``: several times what its last-level cache holds."""

    launch_s: float
    bandwidth: float
    rate: float
    half_rate: float
    cold_bytes: int


GUESS = {
    "cpu": Guess(8e-6, 8e9, 4e10, 4e10, 64 << 20),
    "cuda": Guess(8e-6, 3e12, 4e13, 4e14, 256 << 20),
}


@dataclass(frozen=True)
class Buffers:
    """``pattern`` and ``activations`` in elements; ``pools``: (elements of each buffer, how many), the
    smallest first, for weights of up to that many elements. ``id_bytes``: of all token ids."""

    pattern: int
    activations: int
    pools: tuple[tuple[int, int], ...]
    id_bytes: int = 0

    def nbytes(self, itemsize: int) -> int:
        elements = self.pattern + self.activations + sum(_whole(e, self.pattern) * n for e, n in self.pools)
        return elements * itemsize + self.id_bytes

    def pool(self, probe: Probe) -> int:
        """Number of the pool for the probe's largest weight."""
        needed = _largest(probe)
        return next(k for k, (elements, _) in enumerate(self.pools) if needed <= elements)


@dataclass(frozen=True)
class Sizing:
    """The probes that are measured, and their buffers. ``limited``: not as without a limit."""

    probes: tuple[Probe, ...]
    buffers: Buffers
    limited: bool = False

    def needed_bytes(self, itemsize: int) -> int:
        """The limit that these buffers need."""
        return int(self.buffers.nbytes(itemsize) / _BUDGET)


def sizing(probes: Sequence[Probe], device_type: str, itemsize: int, limit: int = 0) -> Sizing:
    """For a dtype of ``itemsize`` bytes on a server that lets a session hold ``limit`` bytes (0: any)."""
    cold = GUESS[device_type].cold_bytes
    found = buffers(probes, itemsize, cold)
    budget = int(limit * _BUDGET)
    if not limit or found.nbytes(itemsize) <= budget:
        return Sizing(tuple(probes), found)
    # What fits into this server together is smaller, too, and so is what its models read between two uses.
    while found.nbytes(itemsize) > budget and cold > limit // 32:
        cold //= 2
        found = buffers(probes, itemsize, cold)
    by_size = sorted(probes, key=lambda p: p.elements)
    while by_size and found.nbytes(itemsize) > budget:
        by_size.pop()
        found = buffers(by_size, itemsize, cold)
    kept = {id(p) for p in by_size}
    return Sizing(tuple(p for p in probes if id(p) in kept), found, limited=True)


def buffers(probes: Sequence[Probe], itemsize: int, cold_bytes: int) -> Buffers:
    """What all ``probes`` need: one place for activations, and for weights of like sizes a pool of so many
    buffers that they do not fit into caches together."""
    activations = max((_activations(p) for p in probes), default=0)
    pools: list[tuple[int, int]] = []
    for elements in sorted({max(_largest(p), _LEAST_WEIGHT) for p in probes if p.weights}, reverse=True):
        if not pools or 2 * elements < pools[-1][0]:
            pools.append((elements, max(1, min(MAX_CALLS, -(-cold_bytes // (elements * itemsize))))))
    pattern = min(_MOST_PATTERN, max([activations, *(e for e, _ in pools)], default=0))
    ids = sum(8 * prod(p.inputs[name]) for p in probes for name in p.ids)
    return Buffers(max(pattern, 1), _whole(activations, max(pattern, 1)), tuple(reversed(pools)), ids)


def calls(probe: Probe, device_type: str, dtype: torch.dtype, found: Buffers) -> int:
    """So many that a program is long enough, and that each reads its weights from memory."""
    guess = GUESS[device_type]
    rate = guess.half_rate if dtype.itemsize < 4 else guess.rate
    weights = probe.weight_elements
    elements = probe.elements - (weights if probe.ids else 0)
    each = guess.launch_s + max(probe.flops / rate, elements * dtype.itemsize / guess.bandwidth)
    number = PROGRAM_S / each
    if probe.weights and (probe.ids or weights * dtype.itemsize / guess.bandwidth > 0.03 * each):
        number = max(number, min(found.pools[found.pool(probe)][1], COLD_PROGRAM_S / each))
    return max(1, min(MAX_CALLS, round(number)))


def aligned(elements: int) -> int:
    """Operands begin at cache lines, as tensors of their own do."""
    return -(-elements // 64) * 64


def largest_weight(probe: Probe) -> str:
    """Its name: the one that is another in each call. Empty for a probe without weights."""
    return max(probe.weights, key=lambda name: prod(probe.weights[name]), default="")


def _largest(probe: Probe) -> int:
    return prod(probe.weights[largest_weight(probe)])


def _activations(probe: Probe) -> int:
    """Elements of all operands that are the same in each call."""
    largest = largest_weight(probe)
    shapes = (probe.inputs | probe.weights).items()
    return sum(aligned(prod(shape)) for name, shape in shapes if name != largest and name not in probe.ids)


def _whole(elements: int, pattern: int) -> int:
    """Buffers are repetitions of the pattern."""
    return -(-elements // pattern) * pattern
