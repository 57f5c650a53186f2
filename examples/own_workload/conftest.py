"""``pytest-benchmark compare`` asks the conftest.py of the folder that it runs in for these two."""

from genie.bench.grouping import pytest_benchmark_group_stats, pytest_benchmark_scale_unit

__all__ = ["pytest_benchmark_group_stats", "pytest_benchmark_scale_unit"]
