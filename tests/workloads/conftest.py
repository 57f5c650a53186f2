"""Models of the smoke profile, built once for the folder."""

import pytest
import torch

from genie.workloads import WORKLOADS, make_workload


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def smoke():
    """By name: (workload, model, request 0, its local response); the first case where there are many."""
    ready = {}
    for name in WORKLOADS:
        workload = make_workload(name, "smoke")
        model = workload.build_model()
        request = workload.request(0, workload.cases[0])
        ready[name] = (workload, model, request, workload.run(model, request, "cpu"))
    return ready
