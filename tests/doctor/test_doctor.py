"""``genie doctor``: one whole run on this machine, and each check where its trouble is real."""

import json
import os
import socket
import subprocess
import sys

import pytest
import torch

from genie.cli import main
from genie.doctor import canary, cgroups, clocks, cores, libraries, memory, network, tools
from genie.doctor.findings import (
    NOT_APPLICABLE,
    OK,
    PROBLEM,
    WARNING,
    Check,
    Finding,
    Request,
    findings_of,
    ok,
)
from genie.errors import ConnectError

STATUSES = {OK, WARNING, PROBLEM, NOT_APPLICABLE}
#: a finder that makes one library unimportable, as if it were not installed or broken
WITHOUT = """
import importlib.abc, sys

class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == {library!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Absent())
from genie.cli import main
sys.exit(main(["doctor", "--json", "--only", {only!r}]))
"""


@pytest.fixture(scope="module")
def whole_run():
    """Exit status and JSON of ``genie doctor`` as a user runs it."""
    done = subprocess.run(
        [sys.executable, "-m", "genie", "doctor", "--json", "--profile", "smoke"],
        capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout)


def found(whole_run, name):
    return [check for check in whole_run[1]["checks"] if check["name"] == name]


def test_every_finding_has_a_status_and_every_trouble_a_remedy(whole_run):
    for check in whole_run[1]["checks"]:
        assert check["status"] in STATUSES
        assert check["found"]
        assert bool(check["remedy"]) == (check["status"] in (WARNING, PROBLEM)), check


def test_the_exit_status_tells_of_problems_and_not_of_warnings(whole_run):
    status, told = whole_run
    problems = sum(check["status"] == PROBLEM for check in told["checks"])
    assert told["problems"] == problems
    assert told["warnings"] == sum(check["status"] == WARNING for check in told["checks"])
    assert status == (1 if problems else 0)


def test_device_genie_is_run_here_and_on_a_server_that_refuses_a_wrong_token(whole_run):
    (here,) = found(whole_run, "device genie")
    there, refused = found(whole_run, "server")
    assert here["status"] == there["status"] == refused["status"] == OK
    assert "of a server at 127.0.0.1:" in there["found"]
    assert refused["found"] == "a wrong token is refused"


def test_whether_a_driver_tells_of_gpus_is_said(whole_run):
    nvml = [check for check in whole_run[1]["checks"] if check["name"].startswith("NVML")]
    assert nvml
    if not torch.cuda.is_available():
        assert {check["status"] for check in nvml} == {NOT_APPLICABLE}


def test_the_libraries_of_this_environment_are_well(whole_run):
    for name in ("python", "torch", "torchvision", "transformers", "other libraries", "ray", "pytorch rpc"):
        assert all(check["status"] == OK for check in found(whole_run, name)), name


def test_the_canary_says_which_change_is_visible(whole_run):
    (noise,) = found(whole_run, "noise")
    assert noise["status"] in (OK, WARNING)
    assert "two runs differ visibly from" in noise["found"]


@pytest.mark.parametrize(
    ("library", "only", "name"), [("psutil", "libraries", "psutil"), ("ray", "ray", "ray")]
)
def test_a_missing_library_is_a_problem(library, only, name):
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT.format(library=library, only=only)],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    checks = [check for check in json.loads(done.stdout)["checks"] if check["status"] == PROBLEM]
    assert done.returncode == 1
    assert [check["name"] for check in checks] == [name]
    assert "No module named" in checks[0]["found"]
    assert "pip install" in checks[0]["remedy"]


def test_a_source_tree_that_is_not_installed_is_one_problem(monkeypatch):
    monkeypatch.setattr(libraries, "PACKAGE", "genie-bench-that-nobody-installed")
    (python, package), (others,) = libraries.check_python(Request()), libraries.check_others(Request())
    assert (python.status, package.status, others.status) == (OK, PROBLEM, NOT_APPLICABLE)
    assert "pip install" in package.remedy


def test_what_needs_a_missing_library_says_so_once():
    def never(request):
        raise AssertionError("not run")
        yield

    (finding,) = findings_of(Check("memory", never, "", needs=("no_such_library",)), Request())
    assert finding.status == NOT_APPLICABLE
    assert "no_such_library" in finding.found


def test_a_check_that_raises_is_a_problem_beside_what_it_had_found():
    def check(request):
        yield ok("server", "started")
        raise ConnectError("it is silent", "many lines\nIts last words")

    first, second = findings_of(Check("server", check, "look there"), Request())
    assert first == Finding("server", OK, "started")
    assert (second.status, second.remedy) == (PROBLEM, "look there")
    assert "it is silent" in second.found and "Its last words" in second.found


def test_an_unknown_check_and_a_bad_port_are_one_line(capsys):
    for arguments, expected in (
        (["--only", "luck"], "choose from python, torch"),
        (["--port", "70000"], "65535"),
    ):
        assert main(["doctor", *arguments]) == 2
        text = capsys.readouterr().err
        assert expected in text
        assert text.count("\n") == 1


def test_the_table_shows_the_remedy(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        status = main(["doctor", "--only", "ports", "--port", str(taken.getsockname()[1])])
    text = capsys.readouterr().out
    assert status == 1
    assert "problem" in text and "-> stop that process" in text
    assert "1 problem(s), 0 warning(s)" in text


def test_a_port_in_use_names_its_holder():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        _, finding = network.check_ports(Request(port=taken.getsockname()[1]))
    assert finding.status == PROBLEM
    assert f"(pid {os.getpid()})" in finding.found


def test_a_free_port_is_free():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    _, finding = network.check_ports(Request(port=port))
    assert finding.status == OK


def test_the_kernel_counts_the_bytes_of_this_process():
    (finding,) = network.check_tcp_counters(Request())
    assert finding.status == OK


def test_a_path_without_git_is_a_warning(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    (finding,) = tools.check_git(Request())
    assert (finding.status, finding.found) == (WARNING, "not on the PATH")


def test_a_git_that_does_not_run_is_a_warning(monkeypatch, tmp_path):
    broken = tmp_path / "git"
    broken.write_text("#!/bin/sh\necho no git today >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    (finding,) = tools.check_git(Request())
    assert finding.status == WARNING
    assert "no git today" in finding.found


def write(folder, **files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)


def test_the_quota_of_any_ancestor_holds_in_cgroup_2(tmp_path):
    proc, root = tmp_path / "cgroup", tmp_path / "fs"
    proc.write_text("0::/outer/inner\n")
    write(root / "outer", cpu__max="150000 100000\n")
    write(root / "outer/inner", cpu__max="max 100000\n", memory__max="max\n")
    assert cgroups.cpu_quota(proc, root) == 1.5
    assert cgroups.memory_left(proc, root) is None


def test_the_quota_of_cgroup_1_is_read_in_a_container_that_hides_its_path(tmp_path):
    proc, root = tmp_path / "cgroup", tmp_path / "fs"
    proc.write_text("4:memory:/docker/1234\n3:cpu,cpuacct:/docker/1234\n0::/\n")
    write(root / "cpu,cpuacct", cpu__cfs_quota_us="50000\n", cpu__cfs_period_us="100000\n")
    write(
        root / "memory", memory__limit_in_bytes="1000000\n", memory__usage_in_bytes="700000\n",
        memory__stat="cache 300000\ntotal_inactive_file 200000\n",
    )  # fmt: skip
    assert cgroups.cpu_quota(proc, root) == 0.5
    assert cgroups.memory_left(proc, root) == 500000


def test_no_quota_is_none(tmp_path):
    proc, root = tmp_path / "cgroup", tmp_path / "fs"
    proc.write_text("1:cpu:/\n0::/../../elsewhere\n")
    write(root / "cpu", cpu__cfs_quota_us="-1\n", cpu__cfs_period_us="100000\n")
    assert cgroups.cpu_quota(proc, root) is None


def test_a_quota_below_the_visible_cores_is_a_warning():
    assert cores.quota(1.5, 2).status == WARNING
    assert cores.quota(2.0, 2).status == OK
    assert cores.quota(None, 2).status == OK


def test_a_process_that_uses_a_core_is_named():
    with subprocess.Popen([sys.executable, "-c", "print(flush=True)\nwhile True: pass"], stdout=-1) as busy:
        try:
            busy.stdout.readline()
            first, _ = cores.check_free_cores(Request())
        finally:
            busy.kill()
    assert first.status == WARNING
    assert f"(pid {busy.pid})" in first.found


def test_pinning_leaves_the_cores_as_they_were():
    before = os.sched_getaffinity(0)
    (finding,) = cores.check_pinning(Request())
    assert finding.status == OK
    assert os.sched_getaffinity(0) == before


def test_a_governor_that_follows_the_load_is_a_warning(tmp_path):
    for core, governor in ((0, "performance"), (1, "powersave")):
        write(tmp_path / f"cpu{core}/cpufreq", scaling_governor=governor + "\n")
    assert clocks.governors(tmp_path, [0]).status == OK
    assert clocks.governors(tmp_path, [0, 1]).status == WARNING
    assert clocks.governors(tmp_path, [2]).status == NOT_APPLICABLE


def test_a_slow_clock_source_is_a_warning(tmp_path):
    source = tmp_path / "current_clocksource"
    assert clocks.clock_source(source).status == NOT_APPLICABLE
    for name, status in (("tsc", OK), ("hpet", WARNING)):
        source.write_text(name + "\n")
        assert clocks.clock_source(source).status == status


def test_a_folder_for_temporary_files_that_cannot_be_written_is_a_problem():
    finding = memory.temporary(memory.Path("/proc"))
    assert finding.status == PROBLEM
    assert "TMPDIR" in finding.remedy


def test_absent_shared_memory_is_a_problem(tmp_path):
    assert memory.shared_memory(tmp_path / "absent").status == PROBLEM


def test_the_smallest_visible_change_follows_the_formula():
    # Spans whose logarithms are -a and a in turn: their standard deviation is a * sqrt(10 / 9).
    a = 0.01
    samples = [canary.math.exp(a if span % 2 else -a) for span in range(10) for _ in range(3)]
    noise = canary.noise_of(samples)
    sigma = a * (10 / 9) ** 0.5
    assert noise.sigma == pytest.approx(sigma)
    # z of 95 % and of 90 %, from any table
    assert noise.visible() == pytest.approx(canary.math.exp((1.6449 + 1.2816) * sigma * 2**0.5) - 1, rel=1e-3)
    assert noise.runs_for(0.05) == 1
    assert noise.visible(runs=noise.runs_for(0.01)) <= 0.01 < noise.visible(runs=noise.runs_for(0.01) - 1)


def test_a_machine_that_slows_down_is_a_warning():
    samples = [0.010 * (1 + 0.001 * number) for number in range(100)]
    noise = canary.noise_of(samples)
    assert noise.drift == pytest.approx(1.083 / 1.0165 - 1, abs=0.01)
    assert canary.judged(noise, 1).status == WARNING


def test_equal_pieces_of_work_show_everything():
    noise = canary.noise_of([0.010] * 60)
    assert (noise.spread, noise.drift, noise.visible()) == (0.0, 0.0, 0.0)
    assert canary.judged(noise, 1).status == OK
