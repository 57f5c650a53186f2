"""A stream of image batches through a ResNet: layers pipelined over the pool."""

import pytest


@pytest.mark.genie_workload("vision_cnn")
def test_vision_cnn(benchmark, baseline, workload, measure):
    measure(benchmark, baseline, workload)
