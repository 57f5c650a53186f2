"""The gate in a repository of another project, which only uses the suite: nothing of Genie lies in it."""

import pytest

from genie.bench.gate.pairs import Suite, against
from tests.bench.gate.repositories import REPOSITORY, commit, git

CELL = """
import pytest
from classifier import Classifier


@pytest.mark.genie_workload.with_args(Classifier)
def test_classifier(benchmark, baseline, workload, measure):
    measure(benchmark, baseline, workload)
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """What it measures takes its name from the project's own module, which differs in the two commits."""
    folder = tmp_path_factory.mktemp("other")
    git(folder, "init", "--quiet")
    workload = (REPOSITORY / "examples" / "own_workload" / "classifier.py").read_text()
    workload = workload.replace('name = "classifier"', "from theirs import NAME as name")
    files = {"theirs.py": 'NAME = "before"\n', "bench_tests/test_it.py": CELL}
    commit(folder, "before", **files, **{"bench_tests/classifier.py": workload})
    commit(folder, "after", **{"theirs.py": 'NAME = "after"\n'})
    return folder


def test_both_sides_run_their_own_code_under_the_installed_suite(project):
    suite = Suite(baselines=("local_pytorch", "genie_local_remote"), rounds="2")
    with against("before", suite, tell=print, folder=project) as (runner, *_):
        (pair,) = runner.run(1, "first")
    names = [{cell.workload for cell in side.cells.values()} for side in (pair.old, pair.new)]
    assert names == [{"before"}, {"after"}]
    assert len(pair.old.cells) == len(pair.new.cells) == 2
