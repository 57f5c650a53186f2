from __future__ import annotations

import pytest

import genie


@pytest.fixture(autouse=True, scope="session")
def device() -> None:
    genie.enable()
