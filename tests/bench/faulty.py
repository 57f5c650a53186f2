"""Workloads that break what they run on, or show what it keeps; importable by the peers' workers."""

from __future__ import annotations

import os
import signal
import sys

import psutil
import torch

from genie.workloads.protocol import Response
from tests.bench.tiny import Tiny

STOPPED_PID = "GENIE_TEST_STOPPED_PID"


class Doomed(Tiny):
    """In the middle of request 1 kills the servers, or the peer's worker that it runs in.

    Ray dies in the further cell (``again``), everything else in the default one.
    """

    name = "doomed"

    def __init__(self, profile, **options):
        super().__init__(profile, **options)
        self.client = os.getpid()

    def run(self, model, request, device):
        super().run(model, request, device)
        if request.index == 1:
            self.kill(torch.device(device).type)
        return super().run(model, request, device)

    def kill(self, device):
        if os.getpid() != self.client:
            if ("ray" in sys.modules) == ("again" in self.params):
                os.kill(os.getpid(), signal.SIGKILL)
        elif device == "genie":
            for child in psutil.Process().children():
                if "serve" in child.cmdline():
                    child.kill()


class Stalling(Tiny):
    """In the middle of request 1 stops the server whose pid is in the environment: alive, but silent."""

    name = "stalling"

    def run(self, model, request, device):
        if request.index == 1 and torch.device(device).type == "genie":
            os.kill(int(os.environ[STOPPED_PID]), signal.SIGSTOP)
        return super().run(model, request, device)


class Hungry(Tiny):
    """Needs 4 MiB on the device."""

    name = "hungry"

    def run(self, model, request, device):
        x = request.inputs["x"].to(device)
        much = x.repeat(65536, 1)
        return Response({"y": model(much[:2]).cpu()})


class Stateful(Tiny):
    """Holds 32 KiB of state over one sync: what stays on a server, and what travels, shows in the bytes."""

    name = "stateful"

    def run(self, model, request, device):
        state = request.inputs["x"].to(device).repeat(512, 1)
        total = state.sum().item()
        return Response({"y": (model(state[:2]) + total).cpu()})

    def state_bytes(self, request):
        return 512 * request.inputs["x"].nbytes
