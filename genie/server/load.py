"""How busy a server is, for a scheduler that chooses among several."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import torch

from genie.doctor import cgroups
from genie.server.device import Device
from genie.wire.messages import LoadReply


class Holder(Protocol):
    """A session."""

    def add_sizes(self, sizes: dict[int, int]) -> int: ...


def load_of(device: Device, sessions: Iterable[Holder]) -> LoadReply:
    """Counts storages, so contents that several sessions share count once."""
    sizes: dict[int, int] = {}
    number = under_way = 0
    for session in sessions:
        number += 1
        under_way += session.add_sizes(sizes)
    total, free = memory_of(device)
    return LoadReply(
        sessions=number,
        held_bytes=sum(sizes.values()) + under_way,
        busy_s=device.busy_ns * 1e-9,
        memory_total=total,
        memory_free=free,
    )


def memory_of(device: Device) -> tuple[int, int]:
    """Bytes of the device's memory: in all, and free. A control group's limit holds for a CPU."""
    if device.is_cuda:
        free, total = torch.cuda.mem_get_info(device.torch_device)
        return total, free
    import psutil

    memory = psutil.virtual_memory()
    left = cgroups.memory_left()
    return memory.total, memory.available if left is None else max(0, min(memory.available, left))
