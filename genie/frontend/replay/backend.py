"""The Dynamo backend ``genie``: what ``torch.compile(model, backend="genie")`` calls for each graph."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from genie.errors import StaleGraphError
from genie.frontend.replay import dynamo
from genie.frontend.replay.capture import CannotLowerError, Layouts
from genie.frontend.replay.lower import lower
from genie.frontend.replay.segment import Segment
from genie.frontend.tensor import LazyTensor

log = logging.getLogger("genie.replay")

#: how often a graph is lowered anew: because the server laid something out otherwise than inferred, or
#: because its constants belong to a session that is another one now
_RELOWERINGS = 3


class Replay:
    """One traced graph. Runs as a `Segment`, or by lazy capture where that alone is right.

    ``why_lazy`` tells the reason, "" while it replays.
    """

    def __init__(self, gm: torch.fx.GraphModule) -> None:
        self._gm = gm
        # Held weakly: what a model leaves behind when it moves to another device is to be freed.
        self._parameters = {name: weakref.ref(p) for name, p in gm._parameters.items() if p is not None}
        self._segment: Segment | None = None
        self._layouts: Layouts = {}
        self._lowerings = 0
        self.why_lazy = ""

    def lower(self) -> None:
        """At first called while Dynamo traces, so that guards which shape inference adds join Dynamo's."""
        self._lowerings += 1
        before = self._guards()
        try:
            self._put_parameters_back()
            self._segment = Segment(lower(self._gm, self._layouts))
            if self._lowerings > 1 and self._guards() != before:
                raise CannotLowerError("the server's layouts need guards that Dynamo has not made")
        except Exception as exc:  # noqa: BLE001 - lazy capture handles what cannot be lowered
            self._segment = None
            self.why_lazy = f"{type(exc).__name__}: {exc}".splitlines()[0]
            log.info("a graph of %d nodes stays lazy: %s", len(self._gm.graph.nodes), self.why_lazy)
        finally:
            self._leave_parameters()

    def _put_parameters_back(self) -> None:
        for name, parameter in self._parameters.items():
            self._gm._parameters[name] = parameter()

    def _leave_parameters(self) -> None:
        for name in self._parameters:
            self._gm._parameters[name] = None

    def _run_lazily(self, args: tuple) -> Any:
        self._put_parameters_back()
        try:
            return self._gm(*args)
        finally:
            self._leave_parameters()

    def _guards(self) -> int:
        """How many guards the trace's symbolic sizes have."""
        for node in self._gm.graph.find_nodes(op="placeholder"):
            value = node.meta.get("example_value")
            if isinstance(value, FakeTensor) and value.fake_mode.shape_env is not None:
                return len(value.fake_mode.shape_env.guards)
        return 0

    def __call__(self, *args: Any) -> Any:
        segment = self._segment
        if segment is not None and segment.holds_constants_of_another_session(args):
            if self._lowerings > _RELOWERINGS:
                # Sessions that take turns: lowering for each costs more than capture.
                return self._run_lazily(args)
            self.lower()
            segment = self._segment
        if segment is None:
            return self._run_lazily(args)
        if not segment.fits(args):
            # Not captured lazily from the graph: what the program made of the sizes is written into it.
            raise StaleGraphError(
                "a tensor has another shape, stride or dtype than the graph was compiled for, and Dynamo's "
                "guards did not see it (was it assigned to parameter.data?): call torch._dynamo.reset() "
                "after such a change, or replace the parameter"
            )
        out = segment(*args)
        if segment.relayouts:
            self._layouts |= segment.layouts(segment.relayouts)
            segment.relayouts = []
            if self._lowerings <= _RELOWERINGS:
                self.lower()
        return out


def backend(gm: torch.fx.GraphModule, example_inputs: Sequence[Any], **options: Any) -> Callable[..., Any]:
    """Lowers a graph whose tensors are on device ``genie``; any other graph runs as it is.

    Takes no options. Raises nothing of its own: what cannot be replayed soundly is captured lazily,
    which is always right.
    """
    if options:
        raise TypeError(f"backend 'genie' takes no options, got {', '.join(options)}")
    tensors = [t for t in example_inputs if isinstance(t, Tensor)]
    if not any(_on_device(t) for t in tensors):
        return gm
    if torch.is_grad_enabled() and any(t.requires_grad for t in (*tensors, *gm.parameters())):
        return gm  # autograd must see each op
    replay = Replay(gm)
    replay.lower()
    return replay


def _on_device(t: Tensor) -> bool:
    return isinstance(t, LazyTensor) or t.device.type == "genie"


dynamo.install()
