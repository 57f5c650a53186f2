"""Facts about the machine and the libraries that belong to every result file."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from genie.devices import DeviceSlot, available_cores, cores_per_device

LIBRARIES = (
    "torch",
    "torchvision",
    "transformers",
    "ray",
    "numpy",
    "msgspec",
    "pytest-benchmark",
    "genie-bench",
)


def machine_facts(slots: list[DeviceSlot]) -> dict[str, Any]:
    """For pytest-benchmark's ``machine_info["genie"]``; plain JSON values only."""
    return {
        "cpu_model": _cpu_model(),
        "cores": list(available_cores()),
        "cores_per_device": cores_per_device(),
        "slots": [{"type": slot.type, "index": slot.index, "cores": list(slot.cores)} for slot in slots],
        "gpus": _gpus(),
        "libraries": {name: _version(name) for name in LIBRARIES},
    }


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
        if line.lower().startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _gpus() -> list[dict[str, str]]:
    """Name, driver and clocks of each GPU that the driver lists; empty without a driver."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return []
    try:
        driver = _text(pynvml.nvmlSystemGetDriverVersion())
        gpus = []
        for index in range(pynvml.nvmlDeviceGetCount()):
            handle = pynvml.nvmlDeviceGetHandleByIndex(index)
            clock = pynvml.nvmlDeviceGetMaxClockInfo(handle, pynvml.NVML_CLOCK_SM)
            name = _text(pynvml.nvmlDeviceGetName(handle))
            gpus.append({"name": name, "driver": driver, "max_sm_mhz": str(clock)})
        return gpus
    finally:
        pynvml.nvmlShutdown()


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
