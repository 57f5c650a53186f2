from __future__ import annotations

from collections.abc import Iterator

import pytest

import genie

from genie.frontend.session import Session
from genie.runtime.in_process import local


@pytest.fixture
def session() -> Iterator[Session]:
    with local() as s:
        yield s


@pytest.fixture(autouse=True, scope="session")
def device() -> None:
    genie.enable()  # before any test's first backward()
