"""The judge: plain local PyTorch on a model of its own, run again on the inputs of each timed request.

``local_pytorch``'s own cell is judged by it too: the model here is built separately, and the
request is made afresh from its index, so an overwritten weight or input does not go unseen.
"""

from __future__ import annotations

from collections import OrderedDict

import torch

from genie.devices import DeviceSlot
from genie.workloads.protocol import ModelInfo, Response, Verification, Workload

#: reference outputs kept for the other baselines of the same cell; the oldest are computed again
CACHE_BYTES = 512 * 2**20


def response_bytes(response: Response) -> int:
    return sum(tensor.nbytes for tensor in response.outputs.values())


def as_returned(response: Response) -> Response:
    """A copy of what ``run`` has just returned: nobody can finish or mend it once the timer has stopped."""
    outputs = {name: tensor.clone() for name, tensor in response.outputs.items()}
    return Response(outputs, list(response.token_s))


class Reference:
    """Reference results of one workload (at fixed parameters)."""

    def __init__(self, workload: Workload, slot: DeviceSlot) -> None:
        self._workload = workload
        self._device = slot.torch_device
        model = workload.build_model()
        self.model_info: ModelInfo = workload.model_info(model)
        self._model = model.to(self._device)
        self._responses: OrderedDict[tuple[int, str], Response] = OrderedDict()
        self._held = 0

    def response(self, index: int, case: str) -> Response:
        """The local answer to request ``index`` of ``case``; cached while memory allows."""
        key = (index, case)
        if key in self._responses:
            self._responses.move_to_end(key)
            return self._responses[key]
        response = self._workload.run(self._model, self._workload.request(index, case), self._device)
        self._responses[key] = response
        self._held += response_bytes(response)
        while self._held > CACHE_BYTES and len(self._responses) > 1:
            self._held -= response_bytes(self._responses.popitem(last=False)[1])
        return response

    def judge(self, index: int, case: str, response: Response) -> Verification:
        """Verdict on ``response``, which some baseline gave to request ``index`` of ``case``."""
        reference = self.response(index, case)
        misfit = _shape_misfit(response, reference)
        if misfit:
            return Verification(ok=False, kind="allclose", max_abs_err=None, detail=misfit)
        request = self._workload.request(index, case)
        return self._workload.verify(self._model, request, response, reference)


def _shape_misfit(response: Response, reference: Response) -> str:
    """Outputs that are missing, extra, of another shape or dtype, or not on the CPU. "" if none."""
    if response.outputs.keys() != reference.outputs.keys():
        return f"outputs {sorted(response.outputs)} where {sorted(reference.outputs)} were expected"
    for name, expected in reference.outputs.items():
        got = response.outputs[name]
        if got.device != torch.device("cpu"):
            return (
                f"output {name!r} is on {got.device}; a request ends when its result is on the client's CPU"
            )
        if got.shape != expected.shape or got.dtype != expected.dtype:
            return (
                f"output {name!r} is {tuple(got.shape)} {got.dtype} "
                f"where {tuple(expected.shape)} {expected.dtype} was expected"
            )
    return ""
