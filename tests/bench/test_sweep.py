"""The folder of server logs that the controller of a parallel sweep makes."""

import pytest

from genie.bench import sweep
from genie.errors import ConnectError


class Servers:
    def close(self):
        pass


class Terminal(list):
    def write_line(self, line):
        self.append(line)


@pytest.fixture
def shared(monkeypatch):
    monkeypatch.setattr(sweep, "StartedServers", lambda slots, log_dir: Servers())
    return sweep.SharedPool([])


def finish(shared, exitstatus):
    shown = Terminal()
    shared.pytest_sessionfinish(exitstatus=exitstatus)
    shared.pytest_terminal_summary(terminalreporter=shown, exitstatus=exitstatus)
    shared.close()
    return shown


def test_logs_are_removed_after_a_clean_run(shared):
    assert finish(shared, pytest.ExitCode.OK) == []
    assert not shared.log_dir.exists()


@pytest.mark.parametrize("exitstatus", [pytest.ExitCode.TESTS_FAILED, pytest.ExitCode.INTERRUPTED])
def test_logs_are_kept_and_named_when_something_went_wrong(shared, exitstatus):
    shown = finish(shared, exitstatus)
    assert shown == [f"genie: the servers' logs are in {shared.log_dir}"]
    assert shared.log_dir.is_dir()
    shared.log_dir.rmdir()


def test_servers_that_do_not_start_end_the_run_with_their_reason(monkeypatch):
    def fails(slots, log_dir):
        raise ConnectError("the server for cpu:0 could not start", "its log")

    monkeypatch.setattr(sweep, "StartedServers", fails)
    with pytest.raises(pytest.UsageError, match=r"could not start\n[^$]*its log\n.*genie-logs-"):
        sweep.SharedPool([])
