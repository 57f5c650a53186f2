"""PyTorch's operator database on device genie, op by op, against the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import genie
from genie.devices import device_slot
from genie.runtime.server_process import ServerProcess, start_servers
from tests.conformance import expectations, table
from tests.conformance.cases import OPS
from tests.conformance.checks import run_op

TOKEN = "conformance"


@pytest.mark.parametrize("name", OPS)
def test_conforms(name: str, samples: int) -> None:
    with genie.local():
        report = run_op(OPS[name], samples)
    assert not expectations.complaints(name, report)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    logs: Path = tmp_path_factory.mktemp("server")
    (started,) = start_servers([device_slot("cpu", 0)], token=TOKEN, log_dir=logs)
    yield started
    started.close()


@pytest.mark.parametrize("name", list(OPS)[:: table.REMOTE_STEP])
def test_conforms_on_a_server(name: str, server: ServerProcess) -> None:
    with genie.connect(server.address, TOKEN):
        report = run_op(OPS[name], 1)
    assert not expectations.complaints(name, report)


def test_the_committed_table_lists_what_is_unsupported() -> None:
    text = table.PATH.read_text()
    assert table.lists() in text, f"{table.PATH.name} is out of date: run `{table.COMMAND}`"


def test_at_least_97_percent_pass() -> None:
    assert len(expectations.UNSUPPORTED) <= 0.03 * len(OPS)
