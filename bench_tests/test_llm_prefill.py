"""A batch of long prompts: a compute-bound phase that splits over the pool."""

import pytest


@pytest.mark.genie_workload("llm_prefill")
def test_llm_prefill(benchmark, baseline, workload, measure):
    measure(benchmark, baseline, workload)
