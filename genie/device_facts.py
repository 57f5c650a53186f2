"""Facts about a host and its devices that decide whether two results may be compared.

Servers tell them to their clients, and the suite stores them with every result; both read them here.
"""

from __future__ import annotations

import platform
from functools import cache
from pathlib import Path
from typing import Any

import msgspec
import torch

from genie import nvml
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


def gpus() -> tuple[list[dict[str, Any]] | None, str]:
    """Each GPU that the driver lists, as it is now (`genie.nvml.GpuState`, without what a request changes);
    or None and one line of why."""
    with nvml.loaded() as (driver, why):
        if driver is None:
            return None, why
        handles = [driver.by_index(index) for index in range(driver.count())]
        found = []
        for handle in handles:
            state = msgspec.structs.asdict(driver.state(handle)) if handle is not None else {}
            found.append({key: value for key, value in state.items() if key not in _OF_A_REQUEST})
        return found or None, "" if found else "the driver lists no GPU"


#: no property of a machine
_OF_A_REQUEST = ("utilization", "energy_mj")


def _driver_and_clock(index: int) -> tuple[str | None, int | None]:
    """Of torch's GPU number ``index``; None where the driver does not tell (a slice has no clock)."""
    with nvml.loaded() as (driver, _):
        if driver is None:
            return None, None
        handle = driver.by_uuid(str(torch.cuda.get_device_properties(index).uuid))
        if handle is None:
            return driver.version(), None
        state = driver.state(handle)
        return state.driver, state.max_sm_mhz
