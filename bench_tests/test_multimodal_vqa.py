"""Image and text towers of CLIP, candidates ranked: independent branches."""

import pytest


@pytest.mark.genie_workload("multimodal_vqa")
def test_multimodal_vqa(benchmark, baseline, workload, measure):
    measure(benchmark, baseline, workload)
