"""Single ops at many sizes: what the cost model predicts, against what is measured."""

import pytest


@pytest.mark.genie_workload("microbenchmark")
def test_microbenchmark(benchmark, baseline, workload, measure):
    measure(benchmark, baseline, workload)
