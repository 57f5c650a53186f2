"""``genie gate`` as it is typed: exit statuses, refusals, and real runs of the suite."""

import copy
import json
import signal
import subprocess
import sys

import psutil
import pytest

from genie.cli import main
from tests.bench.conftest import REPOSITORY
from tests.bench.gate.inputs import FINGERPRINT, cell, run, write

CELLS = """
import pytest
from tests.bench.tiny import Tiny

@pytest.mark.genie_workload.with_args(Tiny)
def test_tiny(benchmark, baseline, workload, measure):
    measure(benchmark, baseline, workload)
"""


@pytest.fixture(autouse=True)
def no_step_summary(monkeypatch):
    monkeypatch.delenv("GITHUB_STEP_SUMMARY", raising=False)


@pytest.fixture
def old(tmp_path):
    return write(tmp_path / "old.json", cell("local_pytorch", 0.05), cell("genie_full", 0.1))


def gate(old, new, *more):
    return main(["gate", "--stored", str(old), "--current", str(new), *map(str, more)])


def test_0_passed(old, capsys):
    assert gate(old, old) == 0
    assert "PASSED (exit 0)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("full", "status"),
    [
        ([cell("genie_full", 0.2)], 1),
        ([cell("genie_full", 0.1, wire={"bytes_out": 1001})], 3),
        ([], 4),
        ([cell("genie_full", 0.1, profile="cpu")], 5),
    ],
)
def test_each_finding_has_its_status(old, tmp_path, full, status):
    new = write(tmp_path / "new.json", cell("local_pytorch", 0.05), *full)
    assert gate(old, new, "--json", tmp_path / "out.json") == status
    assert json.loads((tmp_path / "out.json").read_text())["exit_code"] == status


def test_accepted_counters_pass(old, tmp_path):
    changed = cell("genie_full", 0.1, wire={"bytes_out": 900})
    new = write(tmp_path / "new.json", cell("local_pytorch", 0.05), changed)
    assert gate(old, new, "--accept-counters") == 0


@pytest.mark.parametrize("content", ["", '{"benchmarks": [', "[]", '{"benchmarks": []}'])
def test_5_a_damaged_file(old, tmp_path, content, capsys):
    new = tmp_path / "new.json"
    new.write_text(content)
    assert gate(old, new) == 5
    assert f"cannot compare: {new}" in " ".join(capsys.readouterr().out.split())


def test_5_another_schema_version(old, tmp_path, capsys):
    new = write(tmp_path / "new.json", cell("genie_full", schema_version=1))
    assert gate(old, new) == 5
    assert "schema version 1" in capsys.readouterr().out


def test_5_another_fingerprint_is_named_in_every_output(old, tmp_path):
    other = copy.deepcopy(FINGERPRINT)
    other["client"]["cpu_model"] = "another CPU"
    new = write(tmp_path / "new.json", cell("genie_full", 0.1, fingerprint=other))
    files = {name: tmp_path / name for name in ("json", "junit", "markdown")}
    assert gate(old, new, *(part for name, file in files.items() for part in (f"--{name}", file))) == 5
    assert all("cpu_model: a CPU, not another CPU" in _plain(file) for file in files.values())


def test_2_a_full_disk_is_told_after_the_table(old, capsys):
    assert gate(old, old, "--json", "/dev/full") == 2
    out, err = capsys.readouterr()
    assert "PASSED (exit 0)" in out
    assert "genie gate: cannot write /dev/full: No space left on device" in err


def test_a_regression_on_a_full_disk_is_still_a_regression(old, tmp_path):
    new = write(tmp_path / "new.json", cell("local_pytorch", 0.05), cell("genie_full", 0.2))
    assert gate(old, new, "--markdown", "/dev/full") == 1


def test_the_step_summary_of_a_workflow(old, tmp_path, monkeypatch):
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "summary.md"))
    assert gate(old, old) == 0
    assert (tmp_path / "summary.md").read_text().startswith("## Genie gate: passed")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--against", "HEAD", "--current", "x.json"], "--current goes with --stored"),
        (["--against", "HEAD", "--pairs", "2"], "--pairs 3 or more"),
        (["--against", "HEAD", "--profile", "huge"], "choose one of smoke, cpu, gpu"),
        (["--against", "HEAD", "--baselines", "nobody"], "unknown baseline nobody"),
        (["--against", "HEAD", "--rounds", "0"], "--rounds: '0' is not a whole number"),
        (["--stored", "x.json", "--pairs", "5"], "--pairs goes with --against"),
        (["--stored", "x.json", "--allow-dirty"], "--allow-dirty goes with --against"),
        (["--stored", "x.json", "--alpha", "2"], "give --alpha between 0 and 0.5"),
        (["--stored", "x.json", "--json", "/absent/out.json"], "there is no folder /absent"),
    ],
)
def test_2_options_that_cannot_be_are_one_line(arguments, told, capsys):
    assert main(["gate", *arguments]) == 2
    err = capsys.readouterr().err
    assert told in err
    assert err.startswith("genie gate: ")
    assert err.count("\n") == 1


@pytest.mark.parametrize("arguments", [[], ["--against", "HEAD", "--stored", "x.json"]])
def test_2_exactly_one_mode(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["gate", *arguments])
    assert stopped.value.code == 2


def test_help_names_the_statuses_and_loads_nothing_heavy():
    code = (
        "import sys, genie.cli\n"
        "try: genie.cli.main(['gate', '--help'])\n"
        "except SystemExit: print(sorted({'torch', 'scipy', 'pytest', 'rich'} & sys.modules.keys()))\n"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30).stdout
    assert "4  missing cells" in out
    assert out.endswith("[]\n")


def test_without_current_the_suite_is_run_now(pytester, monkeypatch, capfd):
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    pytester.makepyfile(test_cells=CELLS)
    pytester.inline_run(
        "--benchmark-only", "--benchmark-json", "base.json", "--genie-rounds", "4",
        "--genie-profile", "smoke", "--genie-baselines", "local_pytorch,genie_capture_only",
    )  # fmt: skip
    capfd.readouterr()
    # Microseconds, on a machine that is busy with tests: the floor lets any ratio pass.
    assert main(["gate", "--stored", "base.json", "--floor", "900", "--json", "out.json"]) == 0
    assert "2 cells: 2 verified (2 timed)" in capfd.readouterr().err
    record = json.loads((pytester.path / "out.json").read_text())
    assert [found["verdict"] for found in record["cells"]] == ["reference", "same"]
    assert record["cells"][1]["new_s"] != record["cells"][1]["old_s"]


def test_5_a_suite_that_measures_nothing(pytester, capfd):
    write(pytester.path / "base.json", cell("genie_full"))
    assert main(["gate", "--stored", "base.json"]) == 5
    assert "run this in the folder that holds bench_tests" in " ".join(capfd.readouterr().out.split())


def test_130_ctrl_c_ends_the_suite_too(pytester, cells):
    cells(genie_full="Interrupts")
    raw = run(cell("genie_full", workload="tiny"))
    raw["benchmarks"][0]["fullname"] = "test_cells.py::test_tiny[genie_full]"
    (pytester.path / "base.json").write_text(json.dumps(raw))
    (pytester.path / "pytest.ini").write_text("[pytest]\naddopts = -s\n")
    done = subprocess.Popen(
        [sys.executable, "-m", "genie", "gate", "--stored", "base.json"],
        cwd=pytester.path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        # A shell starts background jobs with SIGINT ignored, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    child = None
    for line in done.stderr:
        if "ROUND 1 RUNS" in line:
            (child,) = psutil.Process(done.pid).children()
            done.send_signal(signal.SIGINT)
            break
    done.communicate(timeout=60)
    assert done.returncode == 130
    assert child is not None
    assert not child.is_running()


def _plain(file):
    return file.read_text().replace("\\", "")
