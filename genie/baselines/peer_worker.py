"""The resident model inside a peer's worker: built there once, then one call per request."""

from __future__ import annotations

import gc
import os
import time
import traceback
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import nn

from genie.baselines.protocol import Receipt
from genie.devices import DeviceSlot, pin
from genie.errors import SessionClosedError
from genie.workloads.protocol import ModelInfo, Request, Response, Workload


@dataclass
class Loaded:
    """``load_ms``: building the model and moving it to the device; hashing the weights left out."""

    info: ModelInfo
    load_ms: float
    pid: int


@dataclass
class Done:
    """One answered request. ``remote_ms`` and ``cpu_s`` span the workload's ``run`` in this process."""

    response: Response
    receipt: Receipt
    remote_ms: float
    cpu_s: float


@dataclass
class Failed:
    """What the workload's own code raised, as text: the exception's class may not unpickle elsewhere."""

    message: str
    trace: str
    out_of_memory: bool


class ResidentModel:
    """Holds one workload's model on one device, and runs requests on it."""

    def __init__(self, slot: DeviceSlot) -> None:
        self._slot = slot
        self._workload: Workload | None = None
        self._model: nn.Module | None = None
        pin_process(slot)
        self._device = device_name(slot)

    def load(self, workload: Workload) -> Loaded | Failed:
        """Replace the resident model by ``workload``'s."""
        self.unload()
        try:
            start = time.perf_counter()
            model = workload.build_model()
            build_s = time.perf_counter() - start
            info = workload.model_info(model)
            start = time.perf_counter()
            model = model.to(self._slot.torch_device)
            if self._slot.type == "cuda":
                torch.cuda.synchronize(self._slot.torch_device)
            load_s = build_s + time.perf_counter() - start
        except Exception as error:  # noqa: BLE001 - whatever the workload raises is the client's to see
            return _failed(error)
        self._workload, self._model = workload, model
        print(f"{self._device}: holds {info}", flush=True)
        return Loaded(info, load_s * 1e3, os.getpid())

    def run(self, request: Request, nonce: str) -> Done | Failed:
        """Run one request; ``nonce`` comes back in the receipt."""
        cpu, start = time.process_time(), time.perf_counter()
        try:
            if self._workload is None or self._model is None:
                raise SessionClosedError("the worker holds no model: call prepare() before run()")
            response = self._workload.run(self._model, request, self._slot.torch_device)
        except Exception as error:  # noqa: BLE001 - as in load()
            return _failed(error)
        return Done(
            response,
            Receipt(pid=os.getpid(), device=self._device, nonce=nonce),
            remote_ms=(time.perf_counter() - start) * 1e3,
            cpu_s=time.process_time() - cpu,
        )

    def process_id(self) -> int:
        return os.getpid()

    def unload(self) -> None:
        self._workload = self._model = None
        gc.collect()
        if self._slot.type == "cuda":
            torch.cuda.empty_cache()


def pin_process(slot: DeviceSlot) -> None:
    """Pin every thread of this process to the slot's cores: a library's I/O threads are its own cost."""
    pin(slot)
    for thread in os.listdir("/proc/self/task"):
        with suppress(ProcessLookupError):
            os.sched_setaffinity(int(thread), slot.cores)


def device_name(slot: DeviceSlot) -> str:
    """For the receipt: "cpu:0 AMD EPYC cores 0-1", or "cuda:0 NVIDIA H200"."""
    if slot.type == "cuda":
        return f"cuda:{slot.index} {torch.cuda.get_device_name(slot.index)}"
    return f"cpu:{slot.index} {_cpu_model()} cores {','.join(map(str, sorted(os.sched_getaffinity(0))))}"


def _cpu_model() -> str:
    with open("/proc/cpuinfo") as lines:
        for line in lines:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return os.uname().machine


def _failed(error: Exception) -> Failed:
    return Failed(
        f"{type(error).__name__}: {error}",
        traceback.format_exc(),
        isinstance(error, (torch.OutOfMemoryError, MemoryError)),
    )
