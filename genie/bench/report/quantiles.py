"""Which percentiles a number of samples supports, and their bounds.

The rule: a percentile is shown only where its upper 95% confidence bound exists without any
assumption on the distribution. Of n independent samples the largest lies above the q-quantile with
probability 1 - q^n, so n >= ln(0.05) / ln(q): 5 samples for p50, 29 for p90, 59 for p95, 299 for p99.
With fewer, an "estimate" is little more than the largest sample under another name.

Source: S. S. Wilks, "Determination of sample sizes for setting tolerance limits", Annals of
Mathematical Statistics 12(1), 1941, pages 91-96. The bounds are order statistics, as in J.-Y. Le
Boudec, "Performance Evaluation of Computer and Communication Systems", EPFL Press, 2010, section 2.2.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import binom

CONFIDENCE = 0.95
PERCENTILES = (50, 90, 95, 99)


@dataclass(frozen=True)
class Percentile:
    """``value_s`` and its upper confidence bound in seconds; both None, and ``why``, if not supported."""

    percent: int
    value_s: float | None
    upper_s: float | None
    why: str = ""


def samples_needed(percent: int) -> int:
    """The least number of samples for which an upper confidence bound of this percentile exists."""
    return math.ceil(math.log(1 - CONFIDENCE) / math.log(percent / 100))


def percentiles(samples_s: Sequence[float]) -> list[Percentile]:
    """Linear interpolation between order statistics (type 7 of Hyndman and Fan), where supported."""
    ordered = sorted(samples_s)
    rows = []
    for percent in PERCENTILES:
        needed = samples_needed(percent)
        if len(ordered) < needed:
            why = f"needs {needed} samples, has {len(ordered)}"
            rows.append(Percentile(percent, None, None, why))
            continue
        # At most `below` samples lie under the quantile with the asked confidence; the next one bounds it.
        below = int(binom.ppf(CONFIDENCE, len(ordered), percent / 100))
        rows.append(Percentile(percent, float(np.quantile(ordered, percent / 100)), ordered[below]))
    return rows
