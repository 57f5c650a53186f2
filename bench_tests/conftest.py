"""``pytest bench_tests -n auto`` checks every cell once, in parallel, on one pool of servers."""

from genie.bench.sweep import pytest_configure_node, pytest_xdist_make_scheduler

__all__ = ["pytest_configure_node", "pytest_xdist_make_scheduler"]
