"""Servers, RPC workers and Ray actors that die in the middle of a cell, all in one run.

Only the cells that need what died fail, each with its reason and log; all others run and are saved.
"""

import pytest

pytestmark = pytest.mark.timeout(180)
BASELINES = "local_pytorch,genie_local_remote,genie_full,pytorch_rpc,ray"


@pytest.fixture(scope="module")
def losses(runs):
    runs.cells("Doomed", smoke=[{"again": 1}])
    arguments = ["--genie-servers", "2", "--genie-baselines", BASELINES, "-v", "--tb", "short"]
    (outcome,) = runs(({}, arguments), timeout=150)
    return outcome


def reason(output, cell):
    """The section of pytest's report about one cell."""
    _, _, after = output.partition(f"test_doomed[{cell}] __")
    return after.partition("\n____")[0]


def test_only_cells_on_what_had_not_died_are_saved(losses):
    output, saved = losses
    assert saved.keys() == {
        "test_doomed[local_pytorch]", "test_doomed[local_pytorch-again1]", "test_doomed[ray]",
    }, output  # fmt: skip


def test_a_server_killed_in_the_middle_of_a_cell_fails_it_with_the_log(losses):
    told = reason(losses[0], "genie_local_remote")
    assert "ServerLostError: the connection to the server at 127.0.0.1:" in told
    message, _, log = told.partition("--- server log ---")
    assert "crashed" in message
    assert "session" in log.partition("log of server")[0]


@pytest.mark.parametrize("cell", ["genie_full", "genie_local_remote-again1", "genie_full-again1"])
def test_later_cells_of_dead_servers_fail_at_once_with_the_log(losses, cell):
    told = reason(losses[0], cell)
    assert "ServerLostError: server 127.0.0.1:" in told
    assert "has died: its cells cannot run" in told
    assert "--- server log ---" in told
    assert "log of server 127.0.0.1:" in told


@pytest.mark.parametrize(("peer", "cell"), [("pytorch_rpc", "pytorch_rpc"), ("ray", "ray-again1")])
def test_a_peer_that_dies_in_the_middle_of_a_cell_fails_it(losses, peer, cell):
    told = reason(losses[0], cell)
    assert f"ServerLostError: {peer} lost" in told
    assert "during run()" in told
    assert "died" in told


def test_later_cells_of_a_broken_pool_fail_at_once(losses):
    told = reason(losses[0], "pytorch_rpc-again1")
    assert "ServerLostError: the RPC pool is broken: pytorch_rpc lost a worker during run()" in told
