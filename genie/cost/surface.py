"""A measured correction over sizes: interpolated between measurements, constant beyond them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

#: Measurements closer than this to each other (in the largest logarithm of a size) are one: their median.
_SAME = 1e-6


class Surface:
    """``value(x)`` for points ``x`` (logarithms of sizes): passes near the measured values.

    Between measurements it is the linear radial interpolant, which in one dimension is the straight line
    between neighbours. Beyond, a point is moved to the edge of what was measured.
    """

    def __init__(self, points: Sequence[Sequence[float]], values: Sequence[float], smoothing: float) -> None:
        given = np.asarray(points, dtype=float)
        if given.ndim != 2 or not np.isfinite(given).all() or not all(map(math.isfinite, values)):
            raise ValueError("a surface needs measurements, and finite ones")
        self.points, self.values = _merged(given, np.asarray(values, dtype=float))
        self.smoothing = smoothing
        self._low, self._high = self.points.min(axis=0), self.points.max(axis=0)
        self._least, self._most = float(self.values.min()), float(self.values.max())
        # As scipy's RBFInterpolator with kernel="linear" and degree 0, whose calls take several times longer.
        n = len(self.points)
        system = np.ones((n + 1, n + 1))
        system[:n, :n] = smoothing * np.eye(n) - _distances(self.points, self.points)
        system[n, n] = 0.0
        solved = np.linalg.solve(system, np.append(self.values, 0.0))
        self._weights, self._level = solved[:n], solved[n]

    def __call__(self, points: Floats) -> Floats:
        """Values at ``points`` (n, dimensions): shape (n,). They never leave the measured range."""
        inside = np.clip(points, self._low, self._high)
        found = self._level - _distances(inside, self.points) @ self._weights
        return np.clip(found, self._least, self._most)


def _distances(points: Floats, others: Floats) -> Floats:
    """Euclidean, (n, m) for (n, dimensions) and (m, dimensions)."""
    return np.sqrt(((points[:, None] - others[None]) ** 2).sum(axis=-1))


def _merged(points: Floats, values: Floats) -> tuple[Floats, Floats]:
    """Each point once, with the median of its values."""
    rounded = np.round(points / _SAME).astype(np.int64)
    _, first, inverse = np.unique(rounded, axis=0, return_index=True, return_inverse=True)
    if len(first) == len(points):
        return points, values
    inverse = inverse.reshape(-1)
    return points[first], np.array([np.median(values[inverse == k]) for k in range(len(first))])
