"""``genie_capture_only``: what it costs to capture and annotate, with execution in this very process."""

from __future__ import annotations

import time

import torch
from torch import nn

import genie
from genie.baselines.protocol import Reply, Setup
from genie.devices import DeviceSlot
from genie.errors import SessionClosedError
from genie.runtime.in_process import InProcessExecutor
from genie.workloads.protocol import Request, Response, Workload


class GenieCaptureOnly:
    """Lazy capture on device ``genie``; programs run on ``slot`` in this process, weights by reference."""

    name = "genie_capture_only"
    remote = False

    def __init__(self, slot: DeviceSlot) -> None:
        self._slot = slot
        self._executor = InProcessExecutor(slot.torch_device)
        self._session: genie.Session | None = None
        self._model: nn.Module | None = None
        self._workload: Workload | None = None
        self._response: Response | None = None

    def prepare(self, workload: Workload) -> Setup:
        self.close()
        start = time.perf_counter()
        model = workload.build_model()
        load_ms = (time.perf_counter() - start) * 1e3
        info = workload.model_info(model)
        self._executor = InProcessExecutor(self._slot.torch_device)
        self._session = genie.Session(self._executor).activate()
        start = time.perf_counter()
        self._model = model.to("genie")
        self._session.synchronize()
        upload_ms = (time.perf_counter() - start) * 1e3
        self._workload = workload
        return Setup(setup_ms={"load": load_ms, "upload": upload_ms}, model=info, devices=1)

    def run(self, request: Request) -> Response:
        if self._workload is None or self._model is None or self._session is None:
            raise SessionClosedError("genie_capture_only was asked to run before prepare(), or after close()")
        executor = self._executor
        self._before = (self._session.recorder.capture_s, executor.annotate_s, executor.busy_s)
        self._response = self._workload.run(self._model, request, torch.device("genie"))
        return self._response

    def account(self) -> Reply:
        if self._response is None or self._session is None:
            raise SessionClosedError("genie_capture_only has no response to account for: call run() first")
        phases = {
            "capture": (self._session.recorder.capture_s - self._before[0]) * 1e3,
            "plan": (self._executor.annotate_s - self._before[1]) * 1e3,
            "remote": (self._executor.busy_s - self._before[2]) * 1e3,
        }
        response, self._response = self._response, None
        return Reply(response=response, phases_ms=phases)

    def close(self) -> None:
        self._model = self._workload = self._response = None
        if self._session is not None:
            self._session.close("the cell has ended")
            self._session = None
