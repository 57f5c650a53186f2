"""``pytest-benchmark compare`` on saved cells: one group per workload, rows named by baseline."""

import subprocess
import sys

from tests.bench.conftest import REPOSITORY


def test_compare_groups_by_workload_and_names_rows_by_baseline(pytester, cells):
    arguments = cells(genie_full="Remote")
    result = pytester.runpytest_subprocess(
        *arguments, "--benchmark-json", "out.json", "--genie-baselines", "local_pytorch,genie_full"
    )
    result.assert_outcomes(passed=4)
    compared = subprocess.run(
        [sys.executable, "-m", "pytest_benchmark", "compare", str(pytester.path / "out.json")],
        cwd=REPOSITORY, capture_output=True, text=True, check=True, timeout=60,
    ).stdout  # fmt: skip
    assert "benchmark 'tiny': 2 tests" in compared
    assert "benchmark 'tiny batch=4': 2 tests" in compared
    assert "Name (time in ms)" in compared
    rows = [line.split()[0] for line in compared.splitlines() if line.startswith(("local_", "genie_"))]
    assert sorted(rows) == ["genie_full", "genie_full", "local_pytorch", "local_pytorch"]
