"""A workload of one's own: a two-layer classifier on a batch of vectors.

All a baseline may know of it is genie.workloads.protocol.Workload. It stands in a module of its own, not
in the test file or conftest.py, because the workers of the peers import it too.
"""

from dataclasses import dataclass

import torch
from torch import nn

from genie.workloads import batches, seeding, weights
from genie.workloads.protocol import Request, Response
from genie.workloads.verify import verify_tensors

#: features, hidden, classes, batch
SIZES = {"smoke": (64, 256, 10, 16), "cpu": (512, 4096, 1000, 64), "gpu": (4096, 16384, 1000, 256)}


@dataclass(frozen=True)
class Classifier:
    """``batch`` is the further parameter that the test file asks for; None is the profile's own."""

    profile: str
    weights: str = "seeded"
    batch: int | None = None

    name = "classifier"
    dtype = torch.float32
    cases = ("",)
    splittable = True  # the peers may cut a request's batch over their workers

    @property
    def params(self):
        """What differs from the default cell, so that its results are never taken for the default's."""
        return {} if self.batch is None else {"batch": self.batch}

    def build_model(self):
        """On the CPU, in eval mode, without gradients, and the same in every process."""
        features, hidden, classes, _ = SIZES[self.profile]
        return weights.seeded(
            lambda: nn.Sequential(nn.Linear(features, hidden), nn.ReLU(), nn.Linear(hidden, classes)),
            self.dtype,
        )

    def model_info(self, model):
        return weights.model_info(model, self.name, self.dtype, checkpoint=None)

    def request(self, index, case=""):
        """No two requests may have the same input, or an answer could come from a cache."""
        features, _, _, batch = SIZES[self.profile]
        source = seeding.generator(self.name, index)
        return Request(index, {"x": seeding.uniform((self.batch or batch, features), self.dtype, source)})

    def run(self, model, request, device):
        """Plain PyTorch, the same for every baseline. ``device`` may be cpu, cuda or genie."""
        return Response({"logits": model(request.inputs["x"].to(device)).cpu()})

    def split(self, request, parts):
        return batches.split_inputs(request, parts)

    def merge(self, responses):
        return Response({"logits": batches.joined(responses, "logits")})

    def verify(self, model, request, response, reference):
        """``reference`` is local PyTorch's answer to the same request, from a model built separately."""
        return verify_tensors(response.outputs, reference.outputs, self.dtype)

    def state_bytes(self, request):
        """No state lives from one synchronisation to the next, as a KV cache would."""
        return 0
