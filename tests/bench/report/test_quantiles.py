"""Percentiles are shown where the samples support them, and nowhere else."""

from __future__ import annotations

import pytest

from genie.bench.report.quantiles import percentiles, samples_needed


@pytest.mark.parametrize(("percent", "needed"), [(50, 5), (90, 29), (95, 59), (99, 299)])
def test_needed_samples_are_those_of_wilks(percent, needed):
    assert samples_needed(percent) == needed


def test_seven_rounds_support_the_median_only():
    rows = percentiles([float(value) for value in range(1, 8)])
    assert [(row.percent, row.value_s) for row in rows] == [(50, 4.0), (90, None), (95, None), (99, None)]
    assert rows[1].why == "needs 29 samples, has 7"


@pytest.mark.parametrize("number", [5, 29, 59, 299, 500])
def test_bounds_exist_exactly_where_the_percentile_is_shown(number):
    ordered = [float(value) for value in range(number)]
    for row in percentiles(ordered):
        assert (row.value_s is not None) == (number >= samples_needed(row.percent))
        if row.value_s is not None:
            assert row.value_s <= row.upper_s <= max(ordered)


def test_the_bound_holds_as_often_as_it_says():
    """The upper bound of p90 from 29 uniform samples is above 0.9 in about 95% of draws."""
    import random

    rng = random.Random(3)
    draws = [percentiles([rng.random() for _ in range(29)])[1] for _ in range(600)]
    assert 0.93 <= sum(row.upper_s >= 0.9 for row in draws) / len(draws) <= 0.98


def test_no_samples_support_nothing():
    assert all(row.value_s is None for row in percentiles([]))
