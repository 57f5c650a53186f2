"""Measures a workload of one's own on all seven baselines.

pytest examples/own_workload --benchmark-only --genie-profile smoke
"""

import pytest
from classifier import Classifier


# with_args, because pytest would take a bare class for what is marked. Further parameters are further
# tests, by profile.
@pytest.mark.genie_workload.with_args(Classifier, smoke=[{"batch": 64}])
def test_classifier(benchmark, baseline, workload, measure):
    measure(benchmark, baseline, workload)
