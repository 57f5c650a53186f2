"""The device that a server serves."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable

import torch
from torch import Tensor

from genie.device_facts import DeviceFacts
from genie.server.engines.graphs import SHARE_OF_MEMORY, GraphPool
from genie.server.engines.inductor import Compiler
from genie.server.transfers import Transfers

log = logging.getLogger("genie.server")


class Device:
    """The one device of this server. ``lock`` serialises execution between sessions."""

    def __init__(self, device: torch.device, name: str, facts: DeviceFacts) -> None:
        self.torch_device = device
        self.transfers = Transfers(device)
        self.name = name
        self.facts = facts
        self.lock = threading.Lock()
        #: executors of requests that wait for the lock: what nobody asked for lets them go first
        self.waiting: set[object] = set()
        self.pid = os.getpid()
        self.is_cuda = device.type == "cuda"
        self.graphs: GraphPool | None = None
        if self.is_cuda:
            total = torch.cuda.get_device_properties(device).total_memory
            self.graphs = GraphPool(int(SHARE_OF_MEMORY * total), compiler=Compiler(device))
        #: why no request can be served any more; "" while the device works
        self.lost = ""
        self.busy_ns = 0  # of executing programs, all sessions
        self._counting = threading.Lock()
        self.synchronize: Callable[[], None] = self._synchronize_cuda if self.is_cuda else _nothing

    def lose(self, reason: str) -> None:
        """It cannot be used again by this process."""
        if not self.lost:
            self.lost = reason
            log.critical("every request is refused from now on: %s", reason)

    def was_busy(self, ns: int) -> None:
        """Counts the time of a program. Any thread may call it, with the lock or without."""
        with self._counting:
            self.busy_ns += ns

    def use_here(self) -> None:
        """To be called first in each thread that works on it: each has a current GPU of its own."""
        if self.is_cuda:
            torch.cuda.set_device(self.torch_device)

    def _synchronize_cuda(self) -> None:
        torch.cuda.synchronize(self.torch_device)

    @property
    def generator(self) -> torch.Generator:
        if self.is_cuda:
            torch.cuda.init()
            return torch.cuda.default_generators[self.torch_device.index]
        return torch.default_generator

    def to_device(self, tensor: Tensor) -> Tensor:
        """Keeps the strides. On the CPU the tensor itself. For the holder of the lock; see `Transfers`."""
        return self.transfers.to_device(tensor)

    def new_payload(self, nbytes: int) -> Tensor:
        """Host memory to receive into; for a GPU pinned, as far as that goes."""
        return self.transfers.new_payload(nbytes)


def _nothing() -> None:
    pass
