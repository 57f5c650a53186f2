"""Servers given by ``--genie-address``: refused, absent, too small, or hanging."""

import contextlib
import os
import signal
import socket

import pytest

from tests.bench.faulty import STOPPED_PID

CONFTEST = """
from genie.bench import watchdog
watchdog.REQUEST_S = 3.0
"""


@pytest.fixture(scope="module")
def outcomes(runs, servers):
    """(output, saved cells) of three runs: bad addresses, a small server, a server that hangs."""
    for workload in ("Tiny", "Hungry", "Stalling"):
        runs.cells(workload)
    (runs.folder / "conftest.py").write_text(CONFTEST)
    with contextlib.closing(socket.socket()) as unused:
        unused.bind(("127.0.0.1", 0))
        nobody = f"127.0.0.1:{unused.getsockname()[1]}"
        small, stopped = servers
        try:
            return runs(
                ({"GENIE_TOKEN": "wrong"}, [
                    "test_tiny.py", "--genie-address", f"{small.address},{nobody}",
                    "--genie-baselines", "local_pytorch,genie_local_remote,genie_full",
                ]),
                ({"GENIE_TOKEN": "right"}, [
                    "test_hungry.py", "test_tiny.py", "--genie-address", small.address,
                    "--genie-baselines", "local_pytorch,genie_local_remote",
                ]),
                ({STOPPED_PID: str(stopped.pid)}, [
                    "test_stalling.py", "--genie-address", stopped.address,
                    "--genie-baselines", "local_pytorch,genie_local_remote",
                ]),
                timeout=90,
            )  # fmt: skip
        finally:
            os.kill(stopped.pid, signal.SIGCONT)


def test_a_wrong_token_fails_the_cell_and_names_the_remedy(outcomes):
    output, saved = outcomes[0]
    assert "AuthError: the server refused the token: give the one it was started with" in output
    assert "test_tiny[genie_local_remote]" not in saved


def test_an_address_where_nobody_listens_fails_the_cell_and_names_the_remedy(outcomes):
    output, saved = outcomes[0]
    assert "ConnectError: no server answers at 127.0.0.1:" in output
    assert "start one with `genie serve`, or correct --genie-address" in output
    assert saved.keys() == {"test_tiny[local_pytorch]"}


def test_out_of_memory_fails_the_cell_and_names_the_option(outcomes):
    output, saved = outcomes[1]
    assert "OutOfMemoryError: " in output
    assert "start the server with a larger --memory-limit" in output
    assert saved.keys() == {
        "test_hungry[local_pytorch]", "test_tiny[local_pytorch]", "test_tiny[genie_local_remote]",
    }  # fmt: skip


def test_a_server_that_hangs_fails_its_cell_in_a_bounded_time(outcomes):
    output, saved = outcomes[2]
    assert "ServerLostError: stalling on genie_local_remote: request 1 got no answer within 3 s" in output
    assert saved.keys() == {"test_stalling[local_pytorch]"}
