from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import genie
from tests.conformance import cases


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--conformance-samples",
        default=str(cases.DEFAULT_SAMPLES),
        metavar="N",
        help=f"samples per op and dtype of the operator database, or 'all' (up to {cases.ALL_SAMPLES})",
    )


@pytest.fixture(scope="session")
def samples(pytestconfig: pytest.Config) -> int:
    # The option is unknown where pytest found this file only while collecting (`pytest` alone).
    return cases.sample_count(
        pytestconfig.getoption("--conformance-samples", default=str(cases.DEFAULT_SAMPLES))
    )


@pytest.fixture(autouse=True, scope="session")
def device() -> None:
    genie.enable()


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The samples are tiny: starting threads for them costs more than it brings."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
