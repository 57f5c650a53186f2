"""A server in a thread of this process, so that tests can look into it, and give it a device that fails."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

import genie
from genie.config import ENGINES
from genie.devices import device_slot
from genie.frontend.session import Session
from genie.server.engines.graphs import Capture, GraphPool, repeated
from genie.server.engines.select import Lane
from genie.server.faults import TailHandler
from genie.server.process import ServeOptions, Server

TOKEN = "a token for engines"
POOL_BYTES = 1 << 30
STOP_SECONDS = 10.0


class Serving:
    """The server with its parts. ``pool`` captures on the CPU by running again, see `repeated`."""

    def __init__(self, memory_limit: int = 0) -> None:
        tail = TailHandler()
        self.server = Server(ServeOptions(memory_limit=memory_limit), device_slot("cpu", 0), TOKEN, tail)
        self.address = self.server.address
        self.device = self.server._device
        self.thread = threading.Thread(target=self.server.serve, daemon=True)
        self.thread.start()

    @property
    def pool(self) -> GraphPool:
        assert self.device.graphs is not None
        return self.device.graphs

    def use_pool(self, limit: int = POOL_BYTES, capture: Capture = repeated) -> GraphPool:
        """For sessions that begin from now on."""
        self.device.graphs = GraphPool(limit, capture)
        return self.device.graphs

    def use_no_pool(self) -> None:
        self.device.graphs = None

    def lanes(self) -> list[Lane]:
        """Of the templates of all open sessions."""
        return [
            lane
            for session in list(self.server._state.sessions.values())
            for template in list(session._executor.templates.values())
            for lane in getattr(template, "lanes", {}).values()
        ]

    def refusals(self) -> list[str]:
        return [lane.refused for lane in self.lanes() if lane.refused]

    def close(self) -> None:
        self.server.stop()
        self.server.close()
        self.thread.join(STOP_SECONDS)


@contextmanager
def session(serving: Serving, *, engines=ENGINES, replay=True, run_ahead=0) -> Iterator[Session]:
    with (
        genie.connect(serving.address, TOKEN, engines=engines, replay=replay, run_ahead=run_ahead) as opened,
        torch.no_grad(),
    ):
        opened.executor.link.begin("0" * 16)
        yield opened


def counters(opened: Session) -> Counter[str]:
    """Of all programs of the session since it was opened or asked the last time."""
    link = opened.executor.link
    link.counters()
    total: Counter[str] = Counter()
    for receipt in link.usage.receipts:
        total.update(receipt.counters)
    link.begin("0" * 16)
    return total


def tokens(model: nn.Module, ids: torch.Tensor, device: str, new: int = 24, **options) -> torch.Tensor:
    options = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "pad_token_id": 0} | options
    options.setdefault("attention_mask", torch.ones_like(ids))
    options = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    return model.generate(ids.to(device), **options).cpu()


def prompt(seed: int = 0, length: int = 9, batch: int = 1, vocabulary: int = 512) -> torch.Tensor:
    return torch.randint(3, vocabulary, (batch, length), generator=torch.Generator().manual_seed(seed))
