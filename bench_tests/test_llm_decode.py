"""Greedy generation with a KV cache: residency and co-location."""

import pytest


@pytest.mark.genie_workload("llm_decode", gpu=[{"batch": 4}])
def test_llm_decode(benchmark, baseline, workload, measure):
    measure(benchmark, baseline, workload)
