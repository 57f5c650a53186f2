"""Baselines that lie. They run real workloads, most of them on real servers; `test_mutants` must refuse each.

Those that derive from `GenieFull` do the request for real and spoil one thing. Those that derive from
`Forger` never send a byte, and invent whatever would prove that they did.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterable
from copy import copy
from dataclasses import replace
from typing import Any

import torch

from genie.baselines.genie_remote import GenieFull
from genie.baselines.local_pytorch import LocalPytorch
from genie.baselines.protocol import Receipt, Reply, Setup, Wire
from genie.bench.features import COUNTED
from genie.bench.options import features_without
from genie.devices import DeviceSlot
from genie.workloads.protocol import ModelInfo, Request, Response, Workload

BANDWIDTH = 1e9  # bytes per second of the network that `SleepingNetwork` imagines


# -- answers that are not what the model says ------------------------------------------------------


class RandomOutput(GenieFull):
    """Random numbers of the right form, for the price of the real request."""

    def run(self, request: Request) -> Response:
        response = super().run(request)
        response.outputs = {name: torch.randn_like(tensor) for name, tensor in response.outputs.items()}
        return response


class DroppedPrompt(GenieFull):
    """Decodes from the prompt's last token alone, and returns the whole prompt in front of the result."""

    def run(self, request: Request) -> Response:
        last = {name: tensor[:, -1:] for name, tensor in request.inputs.items()}
        response = super().run(replace(request, inputs=last))
        response.outputs["ids"] = _continued(request, response.outputs["ids"][:, 1:])
        return response


class SmallerModel(GenieFull):
    """Runs the model without its last layer, and reports the hash of the whole one."""

    def prepare(self, workload: Workload) -> Setup:
        return super().prepare(_LastLayerLess(workload))  # type: ignore[arg-type]


class _LastLayerLess:
    """A GPT-2 workload whose model lost its last layer; it says nothing about that."""

    def __init__(self, workload: Workload) -> None:
        self._workload = workload

    def __getattr__(self, name: str) -> Any:
        return getattr(self._workload, name)

    def build_model(self) -> Any:
        model: Any = self._workload.build_model()
        del model.transformer.h[-1]
        model.config.n_layer -= 1
        return model

    def model_info(self, model: Any) -> ModelInfo:
        return self._workload.model_info(self._workload.build_model())


class CachedAnswer(GenieFull):
    """Sends every prompt, and continues all of them as it continued the first."""

    _continuation: torch.Tensor | None = None

    def run(self, request: Request) -> Response:
        response = super().run(request)
        if self._continuation is None:
            self._continuation = response.outputs["ids"][:, request.inputs["input_ids"].shape[1] :]
        response.outputs["ids"] = _continued(request, self._continuation)
        return response


class OneTokenInAHundred(GenieFull):
    """Changes each hundredth token that it returns, over all its requests."""

    _returned = 0

    def run(self, request: Request) -> Response:
        response = super().run(request)
        ids = response.outputs["ids"]
        new = ids[:, request.inputs["input_ids"].shape[1] :]
        numbers = self._returned + 1 + torch.arange(new.numel()).view_as(new)
        self._returned += new.numel()
        new[numbers % 100 == 0] ^= 1
        return response


class WorkAfterTheTimer(GenieFull):
    """Returns at once with empty outputs, and fills them in while it is asked for its receipts."""

    def run(self, request: Request) -> Response:
        response = super().run(request)
        self._late = {name: tensor.clone() for name, tensor in response.outputs.items()}
        for tensor in response.outputs.values():
            tensor.zero_()
        return response

    def account(self) -> Reply:
        reply = super().account()
        for name, tensor in self._late.items():
            reply.response.outputs[name].copy_(tensor)
        return reply


def _continued(request: Request, continuation: torch.Tensor) -> torch.Tensor:
    return torch.cat([request.inputs["input_ids"], continuation], dim=1)


# -- accounts that are not what happened -----------------------------------------------------------


class ReplayedAccount(GenieFull):
    """Asks the servers once; each later request gets the first one's answer, receipts and bytes."""

    _first: Reply | None = None

    def run(self, request: Request) -> Response:
        return super().run(request) if self._first is None else self._first.response

    def account(self) -> Reply:
        if self._first is None:
            self._first = super().account()
        return copy(self._first)


class FlagThatChangesNothing(GenieFull):
    """Has every feature on, whichever it was asked to leave out."""

    def __init__(self, addresses: Iterable[str], token: str, features: frozenset[str]) -> None:
        super().__init__(list(addresses), token, features_without(()))


class FlagWithForgedCounters(FlagThatChangesNothing):
    """Also counts its programs as if they had left nothing on the server, and nothing had run ahead or on
    another engine."""

    def account(self) -> Reply:
        reply = super().account()
        told = {name for names in COUNTED.values() for name in names}
        reply.receipts = [
            replace(
                receipt,
                counters={k: v for k, v in receipt.counters.items() if k not in told}
                | {"stateless": receipt.programs or 0},
            )
            for receipt in reply.receipts
        ]
        return reply


class FlagThatIsAlwaysOff(GenieFull):
    """Leaves nothing on the server, though it claims residency."""

    def __init__(self, addresses: Iterable[str], token: str, features: frozenset[str]) -> None:
        super().__init__(list(addresses), token, features - {"residency"})


class MoreBytes(GenieFull):
    """Reports one byte more than it sent, at both ends."""

    more = 1

    def account(self) -> Reply:
        reply = super().account()
        wire = reply.wire
        assert wire.server_in is not None
        reply.wire = replace(wire, bytes_out=wire.bytes_out + self.more, server_in=wire.server_in + self.more)
        return reply


class FewerBytes(MoreBytes):
    """Reports one byte less than it sent, at both ends."""

    more = -1


# -- requests that never leave this process --------------------------------------------------------


class LocalUnderARemoteName(LocalPytorch):
    """Plain PyTorch in this process that calls itself Genie."""

    name = "genie_full"
    remote = True


class Forger(LocalUnderARemoteName):
    """Runs here, with receipts of the pool's servers that no server wrote. Admits that nothing was sent."""

    def __init__(self, slot: DeviceSlot, server_pids: Iterable[int]) -> None:
        super().__init__(slot)
        self._pids = sorted(server_pids)

    def account(self) -> Reply:
        reply = super().account()
        reply.receipts = [
            Receipt(
                pid,
                "cpu",
                secrets.token_hex(8),
                ops=480,
                programs=8,
                digest=secrets.token_hex(32),
                counters={"replayed": 8},
            )
            for pid in self._pids[:1]
        ]
        reply.wire = self._wire()
        return reply

    def _wire(self) -> Wire:
        return Wire(round_trips=8, server_in=0, server_out=0)


class SleepingNetwork(Forger):
    """Sleeps as long as the bytes would take, and reports bytes that obey the oracle's closed form."""

    def run(self, request: Request) -> Response:
        response = super().run(request)
        # What a small program needs beside its tensors, in the order of Genie's own frames.
        self._out = sum(tensor.nbytes for tensor in request.inputs.values()) + 14_000
        self._into = sum(tensor.nbytes for tensor in response.outputs.values()) + 1_200
        time.sleep((self._out + self._into) / BANDWIDTH)
        return response

    def _wire(self) -> Wire:
        return Wire(self._out, self._into, round_trips=8, server_in=self._out, server_out=self._into)
