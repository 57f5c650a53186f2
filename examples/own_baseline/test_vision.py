"""The built-in workload on which the baseline of conftest.py should pay."""

import pytest


@pytest.mark.genie_workload("vision_cnn")
def test_vision_cnn(benchmark, baseline, workload, measure):
    measure(benchmark, baseline, workload)
