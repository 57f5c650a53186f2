"""Pairs of real processes on clones of this project: what they import, what fails, what Ctrl-C leaves."""

import json
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from genie.bench.gate.pairs import CACHE, Suite, against, open_state, write_json
from genie.bench.gate.process import WITNESS_VARIABLE, Side, measure
from genie.bench.gate.slowdown import KEY, Slowdown
from genie.errors import CannotCompareError
from tests.bench.gate.repositories import REPOSITORY, clone, commit, git

#: the quickest cell that needs a server
SUITE = Suite(baselines=("genie_local_remote",), rounds="1", select="test_microbenchmark")
#: appended to a module of the old runtime: it leaves its own path where the test looks
MARK = """
import os as _os
with open(_os.environ["RUNTIME_MARKS"], "a") as _marks:
    _marks.write(__file__ + "\\n")
"""
GATE = """
import sys
from pathlib import Path
from genie.bench.gate.pairs import Suite, against

suite = Suite(baselines=("genie_local_remote",), rounds="1", select="test_microbenchmark")
tell = lambda line: print(line, flush=True)
with against("old", suite, tell=tell, folder=Path(sys.argv[1])) as (runner, *_):
    runner.run(2, "first")
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """HEAD is the project as it is; "old" has another runtime and a harness that cannot even be imported."""
    folder = clone(tmp_path_factory.mktemp("project") / "clone")
    link = (folder / "genie" / "runtime" / "link.py").read_text()
    git(folder, "checkout", "--quiet", "-b", "history")
    commit(
        folder,
        "old",
        **{
            "genie/runtime/link.py": link + MARK,
            "genie/bench/plugin.py": "no harness",
            "pytest.ini": "no ini",
        },
    )
    git(folder, "checkout", "--quiet", "-b", "mistake", "now")
    commit(folder, "broken", **{"genie/config.py": "def broken(:\n"})
    git(folder, "checkout", "--quiet", "now")
    return folder


@pytest.fixture(scope="module")
def marks(tmp_path_factory):
    return tmp_path_factory.mktemp("marks") / "marks"


@pytest.fixture(scope="module")
def interrupted(project, marks):
    """A gate of two pairs, interrupted in the second: what it said, its status, its processes."""
    gate = subprocess.Popen(
        [sys.executable, "-c", GATE, str(project)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        cwd=project, env=os.environ | {"RUNTIME_MARKS": str(marks)},
        # A shell starts background jobs with SIGINT ignored, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    try:
        assert gate.stdout is not None
        said = []
        for line in gate.stdout:
            said.append(line)
            if "pair 2 of 2" in line:
                break
        running = wait_for_servers(project)
        gate.send_signal(signal.SIGINT)
        said.append(gate.communicate(timeout=60)[0])
    finally:
        gate.kill()
        gate.wait()
    return "".join(said), running


def processes_of(project):
    """Every live process of a gate run in ``project``, whoever is its parent now."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(WITNESS_VARIABLE, "").startswith(str(project)):
                found.append(process)
        except psutil.Error:
            continue
    return found


def wait_for_servers(project):
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline:
        running = processes_of(project)
        if sum("serve" in process.cmdline() for process in running) == 4:
            return running
        time.sleep(0.1)
    raise AssertionError("no servers were started")


def test_ctrl_c_keeps_what_is_finished_and_leaves_no_process(project, interrupted):
    said, running = interrupted
    assert "1 finished pairs are kept" in said
    assert "--resume" in said
    assert len(running) >= 6, "two pytests with two servers each"
    assert not processes_of(project)
    assert [file.name for file in (project / CACHE / "state").glob("*-old.json")] == ["first-000-old.json"]
    assert len(git(project, "worktree", "list").splitlines()) == 1
    assert not git(project, "status", "--porcelain")


def test_a_resumed_run_measures_what_is_missing_and_each_side_has_its_own_runtime(
    project, interrupted, marks, monkeypatch
):
    monkeypatch.setenv("RUNTIME_MARKS", str(marks))
    kept = project / CACHE / "state" / "first-000-old.json"
    before = kept.stat().st_mtime_ns
    told = []
    with against("old", SUITE, tell=told.append, folder=project, resume=True) as (runner, old, new):
        pair, _ = runner.run(2, "first")
    assert kept.stat().st_mtime_ns == before
    assert told[0] == "1 of 2 pairs were measured before"
    (cell,) = pair.old.cells
    assert pair.new.cells.keys() == {cell}
    assert pair.old.cells[cell].info["verified"]["ok"]
    # Only the old runtime has the mark: its client imported it, under a harness that the old commit broke.
    assert set(marks.read_text().split()) == {str(old.tree / "genie" / "runtime" / "link.py")}
    assert (old.commit, new.commit) == tuple(git(project, "rev-parse", "old", "now").split())


def test_another_comparison_is_not_resumed(project, interrupted):
    other = Suite(baselines=SUITE.baselines, rounds="2", select=SUITE.select)
    with (
        pytest.raises(CannotCompareError, match="rounds: 2, not 1"),
        against("old", other, tell=lambda _: None, folder=project, resume=True),
    ):
        pass


def test_a_revision_that_does_not_run_is_told_with_its_output(project):
    with (
        pytest.raises(CannotCompareError, match=r"broken .*does not build or run[\s\S]*SyntaxError"),
        against("broken", SUITE, tell=lambda _: None, folder=project) as (runner, *_),
    ):
        runner.run(1, "first")


def test_a_slowdown_adds_its_share_to_the_requests(project, tmp_path):
    slow = ("-p", "genie.bench.gate.slowdown", "--genie-slow-workload", "microbenchmark")
    side = Side("slow", "slow", project, arguments=(*slow, "--genie-slow-share", "0.5"))
    suite = Suite(baselines=("local_pytorch", "genie_capture_only"), rounds="1", select="test_microbenchmark")
    (result,) = measure([(side, tmp_path / "slow.json")], suite.arguments(), mirrored=False)
    added = json.loads(result.path.read_text())[KEY]["added"]
    assert len(result.cells) == 2
    assert added.keys() == {cell for cell in result.cells if "genie_capture_only" in cell}
    assert 0.5 <= min(added.values()) < 1.0


def test_a_request_is_slowed_by_the_share_of_its_own_time():
    slowdown = Slowdown("w", 0.2, test="t")
    for programs in (0, 3):
        slowdown.begin()
        for _ in range(programs):
            time.sleep(0.01)
            slowdown.program_ran()
        time.sleep(0.02)
        slowdown.end()
    # A busy machine may take the core away in a spin: more is possible, and is what gets recorded.
    assert all(0.2 <= share < 1 for share in slowdown.added["t"])


def test_a_folder_of_something_else_is_not_emptied(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(CannotCompareError, match="something else"):
        open_state(tmp_path, {}, resume=False)
    assert (tmp_path / "thesis.txt").exists()


def test_there_has_to_be_something_to_resume(tmp_path):
    with pytest.raises(CannotCompareError, match="nothing to resume"):
        open_state(tmp_path, {}, resume=True)


def test_a_run_of_the_installed_package_instead_of_the_tree_is_refused(project, tmp_path):
    for name in ("bench_tests", "pytest.ini", "conftest.py"):
        (tmp_path / name).symlink_to(project / name)
    (tmp_path / "genie").mkdir()
    suite = Suite(baselines=("local_pytorch",), rounds="1", select="test_microbenchmark")
    with pytest.raises(CannotCompareError, match="nothing tells which code"):
        measure([(Side("old", "old", tmp_path), tmp_path / "out.json")], suite.arguments(), mirrored=False)


def test_a_module_that_the_tree_lacks_does_not_come_from_the_installed_package(tmp_path):
    (tmp_path / "genie").mkdir()
    (tmp_path / "genie" / "__init__.py").touch()
    witness = REPOSITORY / "genie" / "bench" / "gate" / "witness"
    environ = os.environ | {"PYTHONPATH": f"{tmp_path}:{witness}", WITNESS_VARIABLE: str(tmp_path)}
    command = [sys.executable, "-c", "import genie.config"]
    done = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=60)
    assert "ModuleNotFoundError: no module 'genie.config'" in done.stderr
    (record,) = (path for path in tmp_path.iterdir() if path.name.isdigit())
    assert record.read_text() == str(tmp_path / "genie" / "__init__.py")


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small file system")
def test_a_full_disk_is_told_and_keeps_what_is_finished(tmp_path):
    """The interpreter is one that fills the disk as a large result would."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "none", str(disk)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip(f"cannot mount: {mounted.stderr.decode()}")
    try:
        (disk / "first-000-old.json").write_text("finished")
        python = tmp_path / "python"
        python.write_text(f'#!/bin/sh\nhead -c 1M /dev/zero > "${WITNESS_VARIABLE}/../result.json"\n')
        python.chmod(0o755)
        with pytest.raises(CannotCompareError, match=r"is full.*--resume"):
            runs = [(Side("new", "new", tmp_path, python), disk / "first-000-new.json")]
            measure(runs, [], mirrored=False)
        assert {file.name for file in disk.glob("*.json")} == {"first-000-old.json"}
        with pytest.raises(CannotCompareError, match="No space left"):
            write_json(disk / "times.json", "x" * 300_000)
    finally:
        subprocess.run(["umount", str(disk)], check=True)
