"""The noise of this machine: the same piece of work again and again, on the cores of one device.

What can be seen through it: two runs whose medians scatter by a standard deviation s (of the logarithm)
differ by a ratio that a one-sided test at level a finds with power 1-b when its logarithm is at least
``(z_a + z_b) * s * sqrt(2 / n)``, with n runs on either side. From the usual formula for a sample size,
N >= (z_a + z_b)^2 (s / d)^2 (NIST/SEMATECH e-Handbook of Statistical Methods, section 7.2.2.2), with
sqrt(2) s for a difference of two. a = 5 %, b = 10 %.

Here s comes from the medians of equal spans within one process. Between processes there is more (memory
layout, other neighbours), so this is the least that a change must be, and not a promise.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import NormalDist, median, quantiles, stdev

from genie.doctor.findings import Finding, Request, ok, warning

SECONDS = 3.0
PIECE_S = 0.010
SPANS = 10
_SIZE = 256
_Z = NormalDist().inv_cdf(0.95) + NormalDist().inv_cdf(0.90)
#: a change of speed within the canary's few seconds that is worth a warning
MOST_DRIFT = 0.05


@dataclass(frozen=True)
class Noise:
    """``spread`` is IQR / median, ``drift`` the last third's median over the first third's, less 1.

    ``sigma`` is the standard deviation of the logarithms of the spans' medians.
    """

    median_s: float
    spread: float
    drift: float
    sigma: float

    def visible(self, runs: int = 1) -> float:
        """The smallest slow-down (0.05 = 5 %) that ``runs`` runs on either side show."""
        return math.exp(_Z * self.sigma * math.sqrt(2 / runs)) - 1

    def runs_for(self, change: float) -> int:
        """Runs on either side that show a slow-down by ``change``."""
        return max(1, math.ceil(2 * (_Z * self.sigma / math.log1p(change)) ** 2))


def noise_of(samples: Sequence[float]) -> Noise:
    """``samples`` are seconds of equal pieces of work in the order of time, at least 3 for each span."""
    size, third = len(samples) // SPANS, len(samples) // 3
    spans = [median(samples[k * size : (k + 1) * size]) for k in range(SPANS)]
    low, middle, high = quantiles(samples, n=4)
    return Noise(
        median_s=middle,
        spread=(high - low) / middle,
        drift=median(samples[-third:]) / median(samples[:third]) - 1,
        sigma=stdev(math.log(value) for value in spans),
    )


def check_canary(request: Request) -> Iterator[Finding]:
    from genie.bench.placement import placed
    from genie.devices import device_slot

    cores = device_slot("cpu", 0).cores
    with placed(cores):
        samples = measure(SECONDS)
    yield judged(noise_of(samples), len(cores))


def judged(noise: Noise, cores: int) -> Finding:
    found = (
        f"{noise.median_s * 1e3:.1f} ms of work on {cores} core(s): IQR {noise.spread:.1%} of the median, "
        f"drift {noise.drift:+.1%}; two runs differ visibly from {noise.visible():.1%} on; a slow-down of "
        f"5 % needs {noise.runs_for(0.05)} run(s) on either side, 10 % {noise.runs_for(0.10)}"
    )
    if noise.visible() > 0.10 or abs(noise.drift) > MOST_DRIFT:
        return warning(
            "noise",
            found,
            "see free cores, steal time and CPU frequency above; then repeat. If it stays so, compare "
            "several runs on either side (genie gate does), not one with one",
        )
    return ok("noise", found)


def measure(seconds: float) -> list[float]:
    """Seconds of each piece, a fixed number of small matrix products of about `PIECE_S` in all."""
    import torch

    left, right = (torch.rand(_SIZE, _SIZE, generator=torch.Generator().manual_seed(0)) for _ in range(2))
    target = torch.empty_like(left)

    def piece(products: int) -> float:
        start = time.perf_counter()
        for _ in range(products):
            torch.mm(left, right, out=target)
        return time.perf_counter() - start

    piece(20)  # threads, caches and the clock of the CPU
    products = max(1, round(PIECE_S / (min(piece(10) for _ in range(5)) / 10)))
    samples: list[float] = []
    until = time.monotonic() + seconds
    while time.monotonic() < until or len(samples) < 3 * SPANS:
        samples.append(piece(products))
    return samples
