"""How pytest-benchmark groups and scales results here.

Plain functions, because ``pytest-benchmark compare`` imports this file and calls them by name,
outside any pytest run.
"""

from genie.bench.grouping import pytest_benchmark_group_stats, pytest_benchmark_scale_unit

__all__ = ["pytest_benchmark_group_stats", "pytest_benchmark_scale_unit"]
