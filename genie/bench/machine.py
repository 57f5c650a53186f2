"""Facts about the machine and the libraries that belong to every result file."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from genie.device_facts import cpu_model, gpus
from genie.devices import DeviceSlot, available_cores, cores_per_device

#: what a measured request runs through; results of other versions of these are not compared
COMPARED_LIBRARIES = ("torch", "torchvision", "transformers", "ray", "numpy", "msgspec")
LIBRARIES = (*COMPARED_LIBRARIES, "pytest-benchmark", "genie-bench")


def machine_facts(slots: list[DeviceSlot]) -> dict[str, Any]:
    """For pytest-benchmark's ``machine_info["genie"]``; plain JSON values only."""
    listed, why = gpus()
    return {
        "cpu_model": cpu_model(),
        "cores": list(available_cores()),
        "cores_per_device": cores_per_device(),
        "slots": [{"type": slot.type, "index": slot.index, "cores": list(slot.cores)} for slot in slots],
        "gpus": listed,
        "gpus_why": why or None,
        "libraries": {name: _version(name) for name in LIBRARIES},
    }


def host_facts() -> dict[str, Any]:
    """The ``client`` of a fingerprint: this host and what it measures with."""
    return {
        "cpu_model": cpu_model(),
        "cores": len(available_cores()),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "libraries": {name: _version(name) for name in COMPARED_LIBRARIES},
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
