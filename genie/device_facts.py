"""Facts about a host and its devices that decide whether two results may be compared.

Servers tell them to their clients, and the suite stores them with every result; both read them here.
"""

from __future__ import annotations

import platform
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import msgspec
import torch

from genie.devices import DeviceSlot


class DeviceFacts(msgspec.Struct, array_like=True, frozen=True):
    """What a device is, for judging whether two results may be compared; None where it is not known."""

    type: str  # "cpu" | "cuda"
    model: str  # of the CPU or the GPU
    cores: int  # CPU cores that the process which drives it may use
    torch: str
    host_cpu: str | None = None  # of a GPU's host
    driver: str | None = None
    max_sm_mhz: int | None = None


@cache
def device_facts(slot: DeviceSlot) -> DeviceFacts:
    """What the device in ``slot`` of this host is."""
    torch_version = str(torch.__version__)
    if slot.type == "cpu":
        return DeviceFacts("cpu", cpu_model(), len(slot.cores), torch_version)
    driver, max_sm_mhz = _driver_and_clock(slot.index)
    return DeviceFacts(
        type=slot.type,
        model=torch.cuda.get_device_name(slot.index),
        cores=len(slot.cores),
        torch=torch_version,
        host_cpu=cpu_model(),
        driver=driver,
        max_sm_mhz=max_sm_mhz,
    )


@cache
def cpu_model() -> str:
    """Model name of this host's CPU, or its architecture where the kernel does not name one."""
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
        if line.lower().startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def gpus() -> list[dict[str, str]]:
    """Name, driver and highest SM clock of each GPU that the driver lists; empty without a driver."""
    with _nvml() as nvml:
        if nvml is None:
            return []
        driver = _text(nvml.nvmlSystemGetDriverVersion())
        found = []
        for index in range(nvml.nvmlDeviceGetCount()):
            handle = nvml.nvmlDeviceGetHandleByIndex(index)
            clock = nvml.nvmlDeviceGetMaxClockInfo(handle, nvml.NVML_CLOCK_SM)
            name = _text(nvml.nvmlDeviceGetName(handle))
            found.append({"name": name, "driver": driver, "max_sm_mhz": str(clock)})
        return found


def _driver_and_clock(index: int) -> tuple[str | None, int | None]:
    """Of torch's GPU number ``index``; None where the driver does not tell (a slice has no clock)."""
    with _nvml() as nvml:
        if nvml is None:
            return None, None
        driver = _text(nvml.nvmlSystemGetDriverVersion())
        # By UUID: CUDA_VISIBLE_DEVICES renumbers torch's devices, but not the driver's.
        uuid = f"GPU-{torch.cuda.get_device_properties(index).uuid}"
        try:
            handle = nvml.nvmlDeviceGetHandleByUUID(uuid.encode())
            return driver, int(nvml.nvmlDeviceGetMaxClockInfo(handle, nvml.NVML_CLOCK_SM))
        except nvml.NVMLError:
            return driver, None


@contextmanager
def _nvml() -> Iterator[Any]:
    """The driver's library, or None on a host without one."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        yield None
        return
    try:
        yield pynvml
    finally:
        pynvml.nvmlShutdown()


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
