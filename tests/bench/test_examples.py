"""The examples run as they are shown; and what ``pytest_genie_baselines`` refuses."""

import shutil
from types import SimpleNamespace

import pytest

from genie.bench.cells import own_baselines
from tests.bench.conftest import REPOSITORY

CELLS = """
import pytest

@pytest.mark.genie_workload("llm_decode")
def test_it(benchmark, baseline, workload, measure): ...
"""
HOOK = "def pytest_genie_baselines(config): return {}"
OPTIONS = ("--genie-profile", "smoke", "--genie-device", "cpu")


def test_the_examples_run_verified_and_a_baseline_counts_below_its_conftest(runs):
    for name in ("own_baseline", "own_workload"):
        shutil.copytree(REPOSITORY / "examples" / name, runs.folder / name)
    baselines = "local_pytorch,local_channels_last"
    arguments = ["own_baseline", "own_workload", "--benchmark-only", "--genie-baselines", baselines]
    ((output, saved),) = runs(({}, [*arguments, "--genie-rounds", "1"]), timeout=120)
    assert saved.keys() == {
        "test_vision_cnn[local_pytorch]",
        "test_vision_cnn[local_channels_last]",
        "test_classifier[local_pytorch]",
        "test_classifier[local_pytorch-batch64]",
    }, output
    own = saved["test_vision_cnn[local_channels_last]"]["extra_info"]
    assert own["verified"]["ok"]
    assert own["ratio_to_local"] > 0
    assert len(own["fingerprint"]["devices"]) == 1
    table = [line.split()[0] for line in output.splitlines() if "ok (" in line and "local_" in line]
    assert table.index("local_channels_last") == 1, "after those built in"
    assert "4 cells: 4 verified (4 timed)" in output


def collected(pytester, *arguments):
    pytester.makepyfile(**{"deep/test_it": CELLS})
    return pytester.runpytest_inprocess(".", "--collect-only", "-q", *OPTIONS, *arguments)


def conftest(pytester, returned):
    """In a folder that is not on the command line, so that it is read during collection."""
    (pytester.path / "deep").mkdir()
    (pytester.path / "deep" / "conftest.py").write_text(HOOK.format(returned))


def test_baselines_of_a_conftest_deeper_down_are_rows_and_can_be_chosen(pytester):
    conftest(pytester, "['mine', 'yours']")
    assert "[yours]" in collected(pytester).stdout.str()
    assert [
        line.partition("::")[2] for line in collected(pytester, "--genie-baselines", "mine").outlines[:1]
    ] == ["test_it[mine]"]


def test_an_unknown_baseline_is_told_those_that_were_added(pytester):
    conftest(pytester, "['mine']")
    result = collected(pytester, "--genie-baselines", "min")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["*unknown baseline min; choose from local_pytorch,*, ray, mine, or name*"])


@pytest.mark.parametrize(
    ("returned", "told"),
    [
        (["genie_full"], "'genie_full' is taken or is no name of a fixture"),
        (["no-name"], "'no-name' is taken or is no name of a fixture"),
        ("mine", "return a list of names"),
    ],
)
def test_a_name_that_cannot_be_a_baselines_is_refused(pytester, returned, told):
    config = pytester.parseconfig()
    hook = SimpleNamespace(pytest_genie_baselines=lambda config: [returned])
    with pytest.raises(pytest.UsageError) as raised:
        own_baselines(config, hook)
    assert told in str(raised.value)


def test_a_refused_name_is_an_error_of_collection_without_a_traceback(pytester):
    conftest(pytester, "['ray']")
    result = collected(pytester)
    assert result.ret == pytest.ExitCode.INTERRUPTED
    result.stdout.fnmatch_lines(["*pytest_genie_baselines: 'ray' is taken*"])
    assert "cells.py" not in result.stdout.str()


def test_a_baseline_without_a_fixture_says_what_to_define(pytester):
    pytester.makeconftest(HOOK.format("['mine']"))
    pytester.makepyfile(CELLS)
    result = pytester.runpytest_inprocess(*OPTIONS, "--genie-baselines", "mine")
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["*pytest_genie_baselines names mine, but no fixture has that name: define*"])
