import pytest

from genie.devices import device_slot
from genie.runtime.server_process import start_servers
from tests.runtime.pools import TOKEN
from tests.server.programs import connection, server

__all__ = ["connection", "server", "trio"]


@pytest.fixture(scope="session")
def trio(tmp_path_factory):
    """Three servers, for tests of pools that kill none."""
    slots = [device_slot("cpu", 0), device_slot("cpu", 1), device_slot("cpu", 0)]
    started = start_servers(slots, token=TOKEN, log_dir=tmp_path_factory.mktemp("trio"))
    yield started
    for process in started:
        assert process.alive(), process.log_tail()
        process.close()
