"""Interpolation of the measured inefficiency."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.interpolate import RBFInterpolator

from genie.cost.surface import Surface


@pytest.mark.parametrize("smoothing", [0.0, 0.02, 1.0])
@pytest.mark.parametrize("dimensions", [1, 2, 4])
def test_it_is_the_linear_radial_interpolant(dimensions, smoothing):
    rng = np.random.default_rng(0)
    points, values = rng.uniform(0, 10, (25, dimensions)), rng.normal(size=25)
    inside = rng.uniform(points.min(axis=0), points.max(axis=0), (40, dimensions))
    expected = RBFInterpolator(points, values, kernel="linear", smoothing=smoothing)(inside)
    found = Surface(points, values, smoothing)(inside)
    np.testing.assert_allclose(found, np.clip(expected, values.min(), values.max()), atol=1e-9)


def test_beyond_the_measurements_it_stays_as_at_their_edge():
    surface = Surface([[0.0], [1.0], [4.0]], [1.0, 3.0, 2.0], 0.0)
    np.testing.assert_allclose(surface(np.array([[-9.0], [0.5], [99.0]])), [1.0, 2.0, 2.0], atol=1e-9)


def test_one_measurement_holds_everywhere():
    np.testing.assert_allclose(Surface([[2.0, 3.0]], [0.5], 0.02)(np.array([[0.0, 0.0], [9.0, 9.0]])), 0.5)


def test_repeated_measurements_count_as_their_median():
    surface = Surface([[1.0], [1.0], [1.0], [2.0]], [5.0, 6.0, 90.0, 7.0], 0.0)
    np.testing.assert_allclose(surface(np.array([[1.0]])), 6.0)


@pytest.mark.parametrize(
    ("points", "values"), [([], []), ([[1.0]], [float("nan")]), ([[float("inf")]], [1.0])]
)
def test_what_is_no_measurement_is_refused(points, values):
    with pytest.raises(ValueError, match="measurements"):
        Surface(points, values, 0.0)
