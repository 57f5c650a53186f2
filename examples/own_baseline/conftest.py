"""A baseline of one's own: plain PyTorch with the model in channels-last memory format.

    pytest examples/own_baseline --benchmark-only --genie-profile smoke

It becomes a row of every table below this folder, is verified like the others, and can be chosen with
``--genie-baselines local_pytorch,local_channels_last``.
"""

import time

import pytest
import torch

from genie.baselines.protocol import Reply, Setup

# For `pytest-benchmark compare`, which asks the conftest.py of the folder that it runs in.
from genie.bench.grouping import pytest_benchmark_group_stats, pytest_benchmark_scale_unit

__all__ = ["pytest_benchmark_group_stats", "pytest_benchmark_scale_unit"]


def pytest_genie_baselines(config):
    """Names of fixtures that are further baselines."""
    return ["local_channels_last"]


@pytest.fixture
def local_channels_last(genie_session):
    """The fixture's name is the baseline's id. ``genie_session.local_slot`` is the one local device."""
    baseline = LocalChannelsLast(genie_session.local_slot.torch_device)
    yield baseline
    baseline.close()


class LocalChannelsLast:
    """Three methods and a close, as in genie.baselines.protocol.Baseline."""

    name = "local_channels_last"
    remote = False  # runs in this process: no receipt is asked for, and no byte may cross a socket

    def __init__(self, device):
        self.device = device

    def prepare(self, workload):
        """Once, before the first request; its costs are recorded apart from the latency."""
        start = time.perf_counter()
        self.workload, model = workload, workload.build_model()
        load_ms = (time.perf_counter() - start) * 1e3
        info = workload.model_info(model)  # before anything is changed: its hash must be local_pytorch's
        self.model = model.to(self.device).to(memory_format=torch.channels_last)
        return Setup({"load": load_ms}, info, devices=1)

    def run(self, request):
        """The timed call: from tensors in ordinary CPU memory to a response in CPU memory."""
        self.response = self.workload.run(self.model, request, self.device)
        return self.response

    def account(self):
        """Right after ``run``, untimed: the same response, and what is known about it."""
        return Reply(self.response)

    def close(self):
        self.workload = self.model = self.response = None
