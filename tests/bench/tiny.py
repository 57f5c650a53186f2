"""A workload that runs in microseconds, an honest stand-in for a remote baseline, and ways to cheat."""

from __future__ import annotations

import atexit
import functools
import hashlib
import os
import secrets
import socket
import subprocess
import sys
import time
from dataclasses import replace

import torch
from torch import nn

from genie.baselines.protocol import Receipt, Reply, Setup, Wire
from genie.workloads.protocol import ModelInfo, Request, Response, Verification


class Tiny:
    """y = W x. ``cases`` may be widened; ``seed`` makes other weights."""

    name = "tiny"
    dtype = torch.float32
    splittable = False

    def __init__(self, profile, weights="seeded", cases=("",), seed=0, **params):
        self.profile, self.cases, self.seed, self.params = profile, tuple(cases), seed, params

    def build_model(self):
        torch.manual_seed(self.seed)
        return nn.Linear(8, 4).eval().requires_grad_(False)

    def model_info(self, model):
        raw = b"".join(tensor.numpy().tobytes() for tensor in model.state_dict().values())
        return ModelInfo("tiny", 36, "float32", "seeded", hashlib.sha256(raw).hexdigest())

    def request(self, index, case=""):
        generator = torch.Generator().manual_seed(index)
        return Request(index, {"x": torch.randn(2, 8, generator=generator)}, case)

    def run(self, model, request, device):
        return Response({"y": model(request.inputs["x"].to(device)).cpu()})

    def verify(self, model, request, response, reference):
        error = (response.outputs["y"] - reference.outputs["y"]).abs().max().item()
        return Verification(error < 1e-5, "allclose", error, f"y is off by {error}")

    def state_bytes(self, request):
        return 1000


FAR_END = """
import socket, sys, threading

def answer(sock):
    while sock.recv(100, socket.MSG_WAITALL):
        sock.sendall(bytes(50))

def accept(server):
    while True:
        threading.Thread(target=answer, args=(server.accept()[0],), daemon=True).start()

server = socket.create_server(("127.0.0.1", 0))
threading.Thread(target=accept, args=(server,), daemon=True).start()
print(server.getsockname()[1], flush=True)
sys.stdin.read()
"""


@functools.cache
def far_end():
    """Port of a process that answers each 100 bytes with 50, and ends with this one."""
    process = subprocess.Popen(
        [sys.executable, "-S", "-E", "-c", FAR_END], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    atexit.register(process.communicate)
    assert process.stdout is not None
    return int(process.stdout.readline())


class Remote:
    """Looks like a run in another process in everything that the harness checks."""

    remote = True

    def __init__(self, name="genie_full"):
        self.name = name
        self.socket = None

    def prepare(self, workload):
        self.close()
        self.socket = socket.create_connection(("127.0.0.1", far_end()))
        self.workload, self.model = workload, workload.build_model()
        return Setup({"load": 1.0, "upload": 2.0}, workload.model_info(self.model), devices=1)

    def run(self, request):
        self.exchange()
        self.response = self.workload.run(self.model, request, "cpu")
        return self.response

    def exchange(self):
        self.socket.sendall(bytes(100))
        assert len(self.socket.recv(50, socket.MSG_WAITALL)) == 50

    def account(self):
        receipt = Receipt(
            os.getppid(), "cpu", secrets.token_hex(8), ops=2, programs=1, digest="d", counters=self.counters()
        )
        return Reply(self.response, [receipt], self.wire())

    def counters(self):
        return {"stateless": 1} if self.name == "genie_no_semantics" else {}

    def wire(self):
        return Wire(bytes_out=100, bytes_in=50, round_trips=1, server_in=100, server_out=50)

    def close(self):
        if self.socket is not None:
            self.socket.close()


class RayStandIn(Remote):
    def __init__(self, fixture):
        super().__init__("ray")


class RandomOutput(Remote):
    def run(self, request):
        super().run(request)
        self.response.outputs["y"] = torch.randn(2, 4)
        return self.response


class CachedAnswer(Remote):
    def run(self, request):
        if not hasattr(self, "response"):
            return super().run(request)
        self.exchange()
        return self.response


class OtherWeights(Remote):
    def prepare(self, workload):
        return super().prepare(Tiny(workload.profile, seed=1))


class HalfTheBatch(Remote):
    def run(self, request):
        return super().run(replace(request, inputs={"x": request.inputs["x"][:1]}))


class NoReceipt(Remote):
    def account(self):
        reply = super().account()
        reply.receipts = []
        return reply


class OwnProcess(Remote):
    def account(self):
        reply = super().account()
        reply.receipts = [replace(reply.receipts[0], pid=os.getpid())]
        return reply


class SameNonce(Remote):
    def account(self):
        reply = super().account()
        reply.receipts = [replace(reply.receipts[0], nonce="again")]
        return reply


class NoOps(Remote):
    def account(self):
        reply = super().account()
        reply.receipts = [replace(reply.receipts[0], ops=0)]
        return reply


class NothingSent(Remote):
    def exchange(self):
        pass

    def wire(self):
        return Wire(server_in=0, server_out=0, round_trips=1)


class EndsDisagree(Remote):
    def wire(self):
        return replace(super().wire(), server_in=99)


class OnTwoDevices(Remote):
    def prepare(self, workload):
        return replace(super().prepare(workload), devices=2)


class Interrupts(Remote):
    """Sleeps long enough for a test to press Ctrl-C in a timed round."""

    def run(self, request):
        if request.index == 1:
            print("ROUND 1 RUNS", flush=True)
            time.sleep(60)
        return super().run(request)
