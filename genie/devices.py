"""What one "device" is on this machine, and how a process is pinned to it.

Without GPUs a device is a set of cores whose size is fixed per machine, whatever the number of
servers (one core where there are two to four): so ``local_pytorch`` and each server own the same.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from genie.errors import ConfigError

DEVICE_TYPES = ("cpu", "cuda")


@dataclass(frozen=True)
class DeviceSlot:
    """One device: ``type`` is "cpu" or "cuda", ``index`` counts from 0, ``cores`` are CPU numbers."""

    type: str
    index: int
    cores: tuple[int, ...]

    @property
    def torch_device(self) -> torch.device:
        return torch.device("cpu") if self.type == "cpu" else torch.device("cuda", self.index)


def available_cores() -> tuple[int, ...]:
    """Cores that the kernel let this process use when it was imported (before any pinning)."""
    return _CORES_AT_START


def cores_per_device() -> int:
    """One core where there are two to four (or one); a quarter of the cores beyond that."""
    return max(1, len(available_cores()) // 4)


def resolve_device_type(requested: str) -> str:
    """ "auto" becomes "cuda" where CUDA works, else "cpu". Raises ConfigError for an absent GPU."""
    if requested == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if requested not in DEVICE_TYPES:
        raise ConfigError(f"unknown device {requested!r}: choose one of auto, {', '.join(DEVICE_TYPES)}")
    if requested == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "device 'cuda' was asked for, but torch sees no CUDA GPU "
            f"(torch {torch.__version__}): use device 'cpu', or install a CUDA build of torch and a driver"
        )
    return requested


def device_slot(device_type: str, index: int) -> DeviceSlot:
    """Slot number ``index``. CPU slots wrap around when there are more servers than cores."""
    cores = available_cores()
    if device_type == "cuda":
        count = torch.cuda.device_count()
        if index >= count:
            raise ConfigError(f"GPU {index} was asked for, but this host has {count}: start fewer servers")
        return DeviceSlot("cuda", index, cores)
    size = cores_per_device()
    start = (index * size) % max(size, len(cores) - len(cores) % size)
    return DeviceSlot("cpu", index, cores[start : start + size])


def pin(slot: DeviceSlot) -> None:
    """Confine the calling process to the slot's cores and size torch's thread pool to match."""
    os.sched_setaffinity(0, slot.cores)
    if slot.type == "cpu":
        torch.set_num_threads(len(slot.cores))


def unpin() -> None:
    """Give the calling process all the cores it started with."""
    os.sched_setaffinity(0, _CORES_AT_START)


_CORES_AT_START = tuple(sorted(os.sched_getaffinity(0)))
