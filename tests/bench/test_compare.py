"""Stored results: raw samples are kept, commits can be told apart, and only like is compared with like."""

import json
import sys

import pytest
from pytest_benchmark import cli

from genie.bench.grouping import pytest_benchmark_group_stats, pytest_benchmark_scale_unit
from tests.bench.conftest import REPOSITORY

#: pytest-benchmark's own takes seconds, and no file is compared by it
QUICK_MACHINE_INFO = "def pytest_benchmark_generate_machine_info(config): return {}"
COMMIT = "c0ffee12" * 5
CELL = "test_stateful[local_pytorch]"


class Store:
    """Folder of pytest-benchmark with one real run (0001), and copies of it that were changed."""

    def __init__(self, runs):
        self.runs = runs
        self.folder = runs.folder / "store"
        self.options = ["--genie-baselines", "local_pytorch", "--benchmark-storage", "store"]
        runs.cells("Stateful")
        (runs.folder / "conftest.py").write_text(QUICK_MACHINE_INFO)
        ((self.output, _),) = runs(({}, [*self.options, "--benchmark-autosave"]), timeout=60)
        (self.first,) = self.folder.rglob("0001_*.json")

    def changed(self, number, change):
        """File ``number``, in which ``change`` was applied to each cell's ``extra_info``."""
        stored = json.loads(self.first.read_text())
        for bench in stored["benchmarks"]:
            change(bench["extra_info"])
        path = self.first.with_name(f"{number:04}_{COMMIT}.json")
        path.write_text(json.dumps(stored))
        return path


@pytest.fixture(scope="module")
def store(runs):
    return Store(runs)


@pytest.fixture
def compare(store, monkeypatch, capsys):
    """``pytest-benchmark compare`` in this repository. Returns what it printed, and its error or ""."""

    def run(*arguments):
        monkeypatch.chdir(REPOSITORY)
        monkeypatch.setattr(
            sys, "argv", ["pytest-benchmark", "--storage", str(store.folder), "compare", *arguments]
        )
        error = ""
        try:
            cli.main()
        except SystemExit as refused:
            error = str(refused)
        return capsys.readouterr().out, error

    return run


def torch_of(store):
    (bench,) = json.loads(store.first.read_text())["benchmarks"]
    return bench["extra_info"]["fingerprint"]["client"]["libraries"]["torch"]


def other_torch(info):
    info["fingerprint"]["client"]["libraries"]["torch"] = "1.0"


def other_weights(info):
    info["weights"]["sha256"] = "f" * 64


def test_a_saved_run_keeps_its_raw_samples(store):
    (bench,) = json.loads(store.first.read_text())["benchmarks"]
    assert len(bench["stats"]["data"]) == bench["stats"]["rounds"] == 3


def test_two_commits_are_told_apart_in_the_table_and_in_its_picture(store, compare, tmp_path):
    store.changed(7, lambda info: None)
    table, _ = compare("0001", "0007", "--histogram", str(tmp_path / "plot"))
    names = {line.split("  ")[0] for line in table.splitlines() if line.startswith("local_")}
    assert names == {f"local_pytorch ({store.first.name[:12]})", "local_pytorch (0007_c0ffee1)"}
    picture = (tmp_path / "plot-stateful.svg").read_text()
    assert picture.startswith("<?xml")
    for name in (*names, "Speed in"):
        assert name in picture


def test_pytest_benchmark_compare_refuses_other_libraries_and_names_them(store, compare):
    path = store.changed(8, other_torch)
    table, error = compare("0001", "0008")
    assert error.splitlines()[:3] == [
        "ERROR: these results may not be compared:",
        f"  {store.first.name} against {path.name}:",
        f"    fingerprint.client.libraries.torch: {torch_of(store)}, not 1.0 ({CELL})",
    ]
    assert "Median" not in table


def test_a_run_compares_with_a_stored_one_only_when_they_are_alike(store):
    store.changed(2, other_torch)
    store.changed(3, other_weights)
    like, early, late = store.runs(
        *(({}, [*store.options, f"--benchmark-compare={number:04}"]) for number in (1, 2, 3)), timeout=90
    )
    output, saved = like
    assert f"local_pytorch ({store.first.name[:12]})" in output
    assert "EXIT 0" in output
    assert "machine_info is different" not in output

    output, saved = early
    assert not saved, "known before the first cell, so none runs"
    assert f"0002_{COMMIT}.json against this run:" in output
    assert f"client.libraries.torch: 1.0, not {torch_of(store)} " in output
    assert f"EXIT {pytest.ExitCode.USAGE_ERROR.value}" in output

    output, saved = late
    assert saved.keys() == {CELL}, "known at the end: what was measured is kept"
    assert "weights.sha256: ffffffffffff..., not " in output
    assert "local_pytorch (0003" not in output
    assert f"EXIT {pytest.ExitCode.USAGE_ERROR.value}" in output


def flat(store, file, **more):
    """What ``pytest-benchmark compare`` makes of the stored cell."""
    (bench,) = json.loads(store.first.read_text())["benchmarks"]
    info = bench["extra_info"] | more
    return bench | bench.pop("stats") | {"extra_info": info, "path": f"/somewhere/{file}", "source": file}


def refused(*benchmarks):
    with pytest.raises(SystemExit) as raised:
        pytest_benchmark_group_stats(None, list(benchmarks), "group")
    return str(raised.value)


def test_another_profile_is_one_line_although_all_else_follows_from_it(store):
    other = {"profile": "cpu", "params": {"batch": 8}, "weights": {"source": "seeded", "sha256": "0"}}
    message = refused(flat(store, "a.json"), flat(store, "b.json", **other))
    assert f"    profile: smoke, not cpu ({CELL})" in message
    assert len(message.splitlines()) == 4


def test_files_are_named_by_path_where_their_names_are_the_same(store):
    benchmarks = [flat(store, "x/out.json"), flat(store, "y/out.json", profile="cpu")]
    assert "/somewhere/x/out.json against /somewhere/y/out.json" in refused(*benchmarks)


def test_rows_of_one_table_need_the_same_client_even_when_no_cell_is_in_both(store):
    elsewhere = flat(store, "b.json", baseline="ray") | {"fullname": "test_stateful[ray]"}
    assert len(pytest_benchmark_group_stats(None, [flat(store, "a.json"), elsewhere], "group")) == 1
    elsewhere["extra_info"]["fingerprint"]["client"]["cores"] = 999
    assert "client.cores: " in refused(flat(store, "a.json"), elsewhere)


def test_grouping_by_something_else_is_refused_as_well(store):
    with pytest.raises(SystemExit, match="profile: smoke, not cpu"):
        benchmarks = [flat(store, "a.json"), flat(store, "b.json", profile="cpu")]
        pytest_benchmark_group_stats(None, benchmarks, "fullname")


def test_results_of_another_schema_version_are_refused_with_a_remedy(store):
    message = refused(flat(store, "a.json", schema_version=1))
    assert "has schema version 1, this suite reads 2 to 3: run the suite again" in message


def test_rows_are_named_by_what_was_switched_off_and_links_by_whose_they_are(store):
    rows = [
        flat(store, "a.json", baseline="genie_full", ablated=["residency"]) | {"fullname": "1"},
        flat(store, "a.json", baseline="genie_local_remote", workload="link") | {"fullname": "2"},
    ]
    ((_, named),) = pytest_benchmark_group_stats(None, rows, "group")
    assert [bench["name"] for bench in named] == ["genie_full -residency", "genie connection"]


@pytest.mark.parametrize(
    ("workload", "slowest", "unit"),
    [("vision_cnn", 4e-4, "m"), ("vision_cnn", 40.0, "m"), ("link", 4e-3, "m"), ("link", 4e-4, "u")],
)
def test_cells_are_told_in_milliseconds_and_quick_links_in_microseconds(workload, slowest, unit):
    rows = [{"extra_info": {"baseline": "genie_local_remote", "workload": workload}}]
    assert pytest_benchmark_scale_unit(None, "seconds", rows, {}, {"median": slowest}, "min")[0] == unit


def test_other_benchmarks_are_left_to_pytest_benchmark(pytester):
    pytester.makeconftest(QUICK_MACHINE_INFO)
    pytester.makepyfile("def test_it(benchmark): benchmark(int)")
    result = pytester.runpytest_inprocess(
        "--benchmark-autosave", "--benchmark-storage", "store", "--benchmark-max-time", "0.01"
    )
    result.assert_outcomes(passed=1)
    result.stdout.fnmatch_lines(["*benchmark: 1 tests*", "test_it *"])
    (stored,) = (pytester.path / "store").rglob("0001_*.json")
    assert "data" not in json.loads(stored.read_text())["benchmarks"][0]["stats"]
