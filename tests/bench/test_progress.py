"""Live progress: a status line that leaves pytest's output as it is, plain lines without a terminal."""

import fcntl
import json
import os
import pty
import re
import signal
import struct
import sys
import termios

import pytest

from genie.bench.progress import PREPARE, ROUND, Estimate, LiveLine, Progress
from genie.runtime.progress import UploadProgress, reported_to
from tests.bench.conftest import REPOSITORY
from tests.bench.screen import Screen

COLUMNS = 200
STATUS = re.compile(r"\r*\n\x1b\[2K([^\x1b]*)\x1b\[A\x1b\[\d+G")

CONFTEST = """
import threading
import time
import pytest
from genie.baselines.local_pytorch import LocalPytorch
from genie.bench import progress
from genie.devices import device_slot

progress.QUIET_S = 0.5

class Slow(LocalPytorch):
    def run(self, request):
        assert {thread.name for thread in threading.enumerate()} <= {"MainThread", "genie-watchdog"}
        time.sleep(0.3)
        return super().run(request)

class Wrong(LocalPytorch):
    name = "genie_capture_only"

    def run(self, request):
        response = super().run(request)
        response.outputs["y"] += 1
        return response

@pytest.fixture
def local_pytorch():
    return Slow(device_slot("cpu", 0))

@pytest.fixture
def genie_capture_only():
    return Wrong(device_slot("cpu", 0))
"""
CELLS = """
import pytest
from tests.bench.tiny import Tiny

@pytest.mark.genie_workload.with_args(Tiny)
def test_tiny(benchmark, baseline, workload, measure):
    measure(benchmark, baseline, workload)
"""
#: several runs in one process, which imports torch once; the output of some goes to a file
RUNS = """
import json, os, sys
import pytest

for log, arguments in json.loads(sys.argv[1]):
    if log:
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT), 1)
    else:
        print("RUN", flush=True)
    pytest.main(arguments)
"""
ARGUMENTS = (
    "--genie-profile", "smoke", "--genie-device", "cpu", "--benchmark-only", "--genie-baselines",
    "local_pytorch,genie_capture_only",
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("progress")
    (made / "conftest.py").write_text(CONFTEST)
    (made / "test_cells.py").write_text(CELLS)
    return made


@pytest.fixture(scope="module")
def outputs(folder):
    """Of a whole run on a terminal, one that gets a Ctrl-C, and two into a file, the last with -q."""
    plan = json.dumps(
        [
            (None, ARGUMENTS),
            (None, [*ARGUMENTS, "-v"]),
            ("log", [*ARGUMENTS, "-v"]),
            ("quiet", [*ARGUMENTS, "-q"]),
        ]
    )
    pid, ours = pty.fork()
    if pid == 0:
        # A shell starts background jobs with SIGINT ignored, and children inherit that.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.chdir(folder)
        environ = os.environ | {"PYTHONPATH": str(REPOSITORY), "TERM": "xterm"}
        os.execve(sys.executable, [sys.executable, "-c", RUNS, plan], environ)
    fcntl.ioctl(ours, termios.TIOCSWINSZ, struct.pack("HHHH", 50, COLUMNS, 0, 0))
    shown, pressed = "", False
    while data := _read(ours):
        shown += data.decode()
        if not pressed and "round 2 of 3" in shown.rpartition("RUN\r\n")[2] and shown.count("RUN\r\n") == 2:
            os.write(ours, b"\x03")
            pressed = True
    os.close(ours)
    os.waitpid(pid, 0)
    _, whole, interrupted = shown.split("RUN\r\n")
    return whole, interrupted, (folder / "log").read_text(), (folder / "quiet").read_text()


@pytest.fixture
def terminal(outputs):
    return outputs[:2]


def _read(descriptor):
    try:
        return os.read(descriptor, 1 << 16)
    except OSError:  # how Linux tells that the other end of a terminal is closed
        return b""


def without_status(output):
    return STATUS.sub("", output).replace("\x1b[J", "")


def test_a_terminal_shows_each_phase_of_each_cell(terminal):
    shown = STATUS.findall(terminal[0])
    phases = [text.partition(": ")[2].partition(",")[0] for text in shown if text.startswith("[1/2]")]
    assert phases == [
        "set-up", "load and upload", "cold request", "warm-up 1 of 2", "warm-up 2 of 2",
        "round 1 of 3", "round 2 of 3", "round 3 of 3", "verifying",
    ]  # fmt: skip
    assert shown[0].startswith("[1/2] Tiny on local_pytorch: set-up, 0:0")
    assert any(text.startswith("[2/2] Tiny on genie_capture_only: verifying") for text in shown)


def test_what_pytest_prints_is_as_if_there_were_no_status_line(terminal):
    whole = terminal[0]
    shown = Screen(COLUMNS, whole).text
    assert shown == Screen(COLUMNS, without_status(whole)).text
    assert re.search(r"^test_cells\.py \.F +\[100%\]$", shown, re.MULTILINE)
    assert re.search(r"^E +genie.errors.VerificationError: tiny on genie_capture_only", shown, re.MULTILINE)
    assert "elapsed" not in shown


def test_ctrl_c_leaves_a_clean_terminal(terminal):
    interrupted = terminal[1]
    shown = Screen(COLUMNS, interrupted).text
    assert shown == Screen(COLUMNS, without_status(interrupted)).text
    assert "KeyboardInterrupt" in shown
    assert "elapsed" not in shown


def test_the_next_run_knows_about_how_long_it_takes(terminal):
    first, second = (STATUS.findall(output)[0] for output in terminal)
    assert "left" not in first
    assert re.search(r"elapsed, about \d+ s left$", second)


def test_a_log_gets_a_line_for_each_cell_and_one_when_it_takes_long(outputs):
    log = outputs[2]
    assert "\x1b" not in log
    lines = [line for line in log.splitlines() if "elapsed" in line]
    assert re.fullmatch(r"\[1/2\] Tiny on local_pytorch, 0:00 elapsed, about \d+ s left", lines[0])
    assert all(re.match(r"\[1/2\] Tiny on local_pytorch: [a-z]+", line) for line in lines[1:-1])
    assert 2 <= len(lines[1:-1]) < 8, "5 requests of 0.3 s, and a line each 0.5 s at most: not each phase"
    assert re.match(r"\[2/2\] Tiny on genie_capture_only, \d:\d\d elapsed", lines[-1])
    assert re.search(r"^test_cells.py::test_tiny\[local_pytorch\] PASSED +\[ 50%\]$", log, re.MULTILINE)


def test_a_quiet_log_gets_none(outputs):
    assert "1 failed, 1 passed" in outputs[3]
    assert "elapsed" not in outputs[3]


def test_a_terminal_that_has_gone_does_not_stop_the_run(pytestconfig):
    ours, theirs = pty.openpty()
    writer = pytestconfig.get_terminal_writer()
    line = LiveLine(theirs, writer)
    line.show("[1/1] cell: round 1 of 3", boundary=True)
    assert b"round 1 of 3" in os.read(ours, 1 << 16)
    os.close(ours)
    for number in (2, 3):
        line.show(f"[1/1] cell: round {number} of 3", boundary=True)
    line.close()
    os.close(theirs)
    assert "write" not in vars(writer) or writer.write.__self__ is writer


class Shown:
    """A display that remembers."""

    def __init__(self):
        self.texts = []

    def begin(self, text):
        self.texts.append(text)

    def show(self, text, boundary):
        self.texts.append(text)

    def close(self):
        self.texts.append("closed")


def test_uploads_are_shown_while_a_cell_is_prepared_and_never_in_a_round():
    shown, progress = Shown(), Progress()
    progress.start(shown, Estimate({}))
    progress.begin("[1/1] cell")
    with reported_to(progress.uploaded):
        progress.phase(PREPARE)
        UploadProgress().add(128_000_000)
        progress.phase(ROUND, 1, 3)
        before = list(shown.texts)
        UploadProgress().add(128_000_000)
    assert "[1/1] cell: load and upload, 128 MB sent, 0:00 elapsed" in before
    assert shown.texts == before


def test_time_left_is_that_of_the_last_run_scaled_by_this_one():
    estimate = Estimate({"a": 10.0, "b": 20.0, "c": 30.0}, ["a", "b", "c"])
    assert estimate.left(0.0) == 60.0
    estimate.begin("a", 0.0)
    assert estimate.left(4.0) == 56.0
    estimate.end(20.0)
    assert estimate.left(20.0) == 100.0, "this run takes twice as long"


def test_time_left_of_unknown_cells_is_the_mean_of_this_run():
    estimate = Estimate({}, ["a", "b", "c"])
    estimate.begin("a", 0.0)
    assert estimate.left(1.0) is None, "nothing is known yet"
    estimate.end(6.0)
    assert estimate.left(6.0) == 12.0
