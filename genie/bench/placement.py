"""Where the measuring process runs during a cell, and how it gets its cores back.

On a machine without GPUs a device is a set of cores: local baselines get exactly slot 0, as each
server gets its own slot; the client of a remote baseline gets the cores outside slot 0, if any.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch

from genie.devices import DeviceSlot, available_cores


def client_cores(slot: DeviceSlot, remote: bool) -> tuple[int, ...]:
    """Cores of this process for a cell: slot 0's for local baselines, the others for a remote one."""
    if not remote:
        return slot.cores
    return tuple(core for core in available_cores() if core not in slot.cores) or available_cores()


@contextmanager
def placed(cores: tuple[int, ...]) -> Iterator[None]:
    """Confine every thread of this process to ``cores``, and torch's thread pool with them."""
    threads = torch.get_num_threads()
    _move_threads(cores)
    torch.set_num_threads(len(cores))
    try:
        yield
    finally:
        _move_threads(available_cores())
        torch.set_num_threads(threads)


def _move_threads(cores: tuple[int, ...]) -> None:
    # The kernel keeps one mask per thread: moving only the calling thread would leave the pools
    # that libraries have already started on their old cores.
    for thread in os.listdir("/proc/self/task"):
        with suppress(ProcessLookupError):
            os.sched_setaffinity(int(thread), cores)
