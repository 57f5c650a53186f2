"""Every test ends: what waits for a process or a socket is cut off."""

import pytest

TIMEOUT_S = 120


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(TIMEOUT_S))
