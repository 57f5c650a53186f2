"""``local_pytorch``: plain eager PyTorch in this process, on one device. The reference row."""

from __future__ import annotations

import time

import torch
from torch import nn

from genie.baselines.protocol import Reply, Setup
from genie.devices import DeviceSlot
from genie.errors import SessionClosedError
from genie.workloads.protocol import Request, Response, Workload


class LocalPytorch:
    """Runs the workload's own program on ``slot``; no other process, no receipt, no bytes."""

    name = "local_pytorch"
    remote = False

    def __init__(self, slot: DeviceSlot) -> None:
        self._slot = slot
        self._workload: Workload | None = None
        self._model: nn.Module | None = None
        self._response: Response | None = None

    def prepare(self, workload: Workload) -> Setup:
        start = time.perf_counter()
        model = workload.build_model()
        setup_ms = {"load": (time.perf_counter() - start) * 1e3}
        info = workload.model_info(model)
        if self._slot.type == "cuda":
            start = time.perf_counter()
            model = model.to(self._slot.torch_device)
            torch.cuda.synchronize(self._slot.torch_device)
            setup_ms["upload"] = (time.perf_counter() - start) * 1e3
        self._workload, self._model = workload, model
        return Setup(setup_ms=setup_ms, model=info, devices=1)

    def run(self, request: Request) -> Response:
        if self._workload is None or self._model is None:
            raise SessionClosedError("local_pytorch was asked to run before prepare(), or after close()")
        self._response = self._workload.run(self._model, request, self._slot.torch_device)
        return self._response

    def account(self) -> Reply:
        if self._response is None:
            raise SessionClosedError("local_pytorch has no response to account for: call run() first")
        response, self._response = self._response, None
        return Reply(response=response)

    def close(self) -> None:
        self._workload = self._model = self._response = None
