"""Every test ends: what waits for a process or a socket is cut off. And which tests may share the machine."""

import os
from pathlib import Path

import pytest

TIMEOUT_S = 120
TESTS = Path(__file__).parent
#: Folders whose tests measure nothing and do without pytest-benchmark, which xdist switches off. The tests of
#: all others have the machine for themselves in .ci/run.
SIDE_BY_SIDE = frozenset(
    "conformance doctor frontend runtime scheduler semantics server srg wire workloads".split()
)


def pytest_configure(config):
    # The options of this run are not meant for those that tests start, but xdist's workers read them too.
    if hasattr(config, "workerinput") or config.getoption("dist", "no") == "no":
        os.environ.pop("PYTEST_ADDOPTS", None)


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(TIMEOUT_S))
        if item.path.is_relative_to(TESTS) and item.path.relative_to(TESTS).parts[0] in SIDE_BY_SIDE:
            item.add_marker(pytest.mark.side_by_side)
