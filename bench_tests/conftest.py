"""``pytest bench_tests -n auto`` checks every cell once, in parallel, on one pool of servers."""

from genie.bench.sweep import pytest_cmdline_main, pytest_configure_node

__all__ = ["pytest_cmdline_main", "pytest_configure_node"]
