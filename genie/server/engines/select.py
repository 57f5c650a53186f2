"""Which engine runs a template: `Engines`.

A template starts with the eager engine, and is observed. When it runs a second time with equal literals, on
externals of equal geometry (but for caches that grew, and masks with them), the program is specialised, and
from then on it runs rewritten, on a GPU as a CUDA graph. The first time what it keeps is compared with an
eager run of the same call. Whatever does not fit, does not agree, cannot be captured or turns out slower
runs eagerly.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import fx

from genie.server.engine import Template
from genie.server.engines.agree import disagreement
from genie.server.engines.graphs import CaptureError, GraphPool
from genie.server.engines.growing import Captured, InPlace
from genie.server.engines.kv import Value, as_tensor, growths_of
from genie.server.engines.masks import take_out_masks
from genie.server.engines.rewrite import rewritten
from genie.server.engines.specialize import NotSpecializableError, Observation, TooAlikeError, specialize
from genie.server.engines.variants import (
    Call,
    Differences,
    Engine,
    Geometry,
    Remembered,
    Specialised,
    Variant,
    bits,
)
from genie.server.faults import is_device_lost
from genie.wire.messages import Check, Relayout

log = logging.getLogger("genie.server")

#: variants of one template in one lane, the one used last longest ago makes room
MOST_VARIANTS = 4
#: runs of which no two were alike, after which a template stays eager
UNLIKE_RUNS = 16
#: bytes that may be copied into a graph's buffers, as a share of what the program reads
COPIED_SHARE = 0.5
#: runs of an engine after which it is given up, if all of them took longer than the best eager one by a tenth
TRIALS = 10
SLOWER = 1.1


class Ran(NamedTuple):
    values: list[Value | None]  # the template's kept values in order
    relayouts: list[Relayout]
    counters: dict[str, int]


@dataclass
class Lane:
    """What is known of a template at one of its places in a request."""

    previous: Remembered | None = None
    variants: list[Variant] = field(default_factory=list)
    changing: set[int] = field(default_factory=set)  # externals that were taken for constant, and are not
    unlike: int = 0
    eager_s: list[float] = field(default_factory=list)
    running: Variant | None = None  # in the run that was last; None: eager
    refused: str = ""


class Engines:
    """Of one session, over the server's ``pool`` (None without a GPU). Used under the device's lock."""

    def __init__(self, device: torch.device, pool: GraphPool | None) -> None:
        self._device = device
        self._pool = pool
        #: what the session asked for, see `Configure`
        self.enabled: frozenset[str] = frozenset()
        self._last: Lane | None = None

    def run(
        self, template: Template, lane_number: int, values: Sequence[Value], literals: Sequence[int],
        floats: Sequence[float], checks: list[Check], tick: Callable[[], None] | None = None,
    ) -> Ran:  # fmt: skip
        """Raises EngineError naming the failing instruction."""
        self._last = None
        call = Call(values, literals, floats)
        if not self.enabled or tick is not None or template.n_ops < 2:
            return self._eagerly(template, call, checks, tick)
        lane = template.lanes.get(lane_number)
        if lane is None:
            lane = template.lanes[lane_number] = Lane()
        self._last, lane.running = lane, None
        if lane.refused or (checks and lane.previous is not None):
            return self._eagerly(template, call, checks)
        for k, variant in enumerate(lane.variants):
            if not checks and variant.fits(call):
                lane.variants.insert(0, lane.variants.pop(k))
                return self._specialised(template, lane, variant, call) or self._eagerly(template, call)
        previous, lane.previous = lane.previous, None
        differences = previous.differences(call) if previous is not None else None
        if previous is not None and differences is None:
            self._unlike(template, lane, "it never runs twice with equal literals and sizes")
        elif previous is not None and differences is not None:
            variant = self._alike(template, lane, previous, differences, call)
            if variant is not None:
                return self._specialised(template, lane, variant, call) or self._eagerly(template, call)
        if lane.refused:
            return self._eagerly(template, call)
        return self._observed(template, lane, call, checks)

    def wants_time(self, template: Template, lane_number: int) -> bool:
        """Whether it matters how long the next run takes: until the engine is chosen."""
        if not self.enabled:
            return False
        lane: Lane | None = template.lanes.get(lane_number)
        if lane is None:
            return True
        if lane.refused:
            return False
        if not lane.variants:
            return len(lane.eager_s) <= TRIALS
        front = lane.variants[0]
        return len(front.seconds) <= TRIALS or (
            isinstance(front.engine, Captured) and front.engine.wants_time
        )

    def took(self, seconds: float) -> None:
        """How long the run before took, the device synchronised. An engine that is slower is given up."""
        lane = self._last
        if lane is None or lane.refused:
            return
        variant = lane.running
        if variant is not None and isinstance(variant.engine, Captured):
            variant.engine.took(seconds)
        if variant is None:
            lane.eager_s = [*lane.eager_s[-TRIALS:], seconds]
        elif len(variant.seconds) <= TRIALS:
            variant.seconds.append(seconds)
            # The first run may have captured.
            best = min(variant.seconds[1:], default=0.0)
            if len(variant.seconds) > TRIALS and lane.eager_s and best > SLOWER * min(lane.eager_s):
                lane.variants.remove(variant)
                self._refuse(None, lane, f"{variant.engine.name} took longer than the eager engine")

    # -- the ways to run -------------------------------------------------------------------------

    def _eagerly(
        self, template: Template, call: Call, checks: list[Check] | None = None,
        tick: Callable[[], None] | None = None,
    ) -> Ran:  # fmt: skip
        values = [as_tensor(v) for v in call.values]
        kept, relayouts = template.run(values, call.literals, call.floats, checks or [], tick)
        return Ran(list(kept), relayouts, {})

    def _observed(self, template: Template, lane: Lane, call: Call, checks: list[Check]) -> Ran:
        """An eager run that the next one can be compared with."""
        values = [as_tensor(v) for v in call.values]
        seen = Observation(values)
        try:
            kept, relayouts = template.run(values, call.literals, call.floats, checks, see=seen.add)
        finally:
            seen.end()
        lane.previous = Remembered(call, seen)
        return Ran(list(kept), relayouts, {})

    def _alike(
        self, template: Template, lane: Lane, previous: Remembered, differences: Differences, call: Call
    ) -> Variant | None:
        """A variant for calls like this one and the one before, if there is to be one."""
        try:
            variant = self._variant(template, lane, previous, differences, call)
        except NotSpecializableError as exc:
            if not any(differences) and not isinstance(exc, TooAlikeError):
                self._refuse(template, lane, str(exc))
            else:
                self._unlike(template, lane, str(exc))
            return None
        lane.unlike = 0
        lane.variants = [variant, *lane.variants[: MOST_VARIANTS - 1]]
        return variant

    def _specialised(self, template: Template, lane: Lane, variant: Variant, call: Call) -> Ran | None:
        eager = None if variant.verified else self._eagerly(template, call)
        try:
            kept = variant.engine.run(call)
            if kept is None:
                return eager
            if eager is None or not (reason := disagreement(kept, eager.values)):
                variant.verified, lane.running = True, variant
                compiled = {"engine_compiled": 1} if variant.engine.compiled else {}
                return Ran(kept, [], variant.counters | compiled)
        except torch.OutOfMemoryError:
            reason = "the device has no memory left for it"
        except CaptureError as exc:
            reason = str(exc)
        except Exception as exc:
            if is_device_lost(exc):
                raise
            # Where the program itself is wrong, its eager run raises.
            reason = f"{type(exc).__name__}: {exc}"
        lane.variants.remove(variant)
        self._refuse(template, lane, f"{variant.engine.name}: {reason}")
        ran = eager if eager is not None else self._eagerly(template, call)
        return ran._replace(counters={"engine_failed": 1})

    def _unlike(self, template: Template, lane: Lane, reason: str) -> None:
        lane.unlike += 1
        if lane.unlike >= UNLIKE_RUNS:
            self._refuse(template, lane, reason)

    def _refuse(self, template: Template | None, lane: Lane, reason: str) -> None:
        lane.refused, lane.previous = reason, None
        what = f"a template of {template.n_ops} ops" if template is not None else "a template"
        log.info("%s stays with the eager engine: %s", what, reason)

    # -- making variants -------------------------------------------------------------------------

    def _variant(
        self, template: Template, lane: Lane, previous: Remembered, differences: Differences, call: Call
    ) -> Variant:
        graph = specialize(template, previous.literals, previous.floats, previous.seen)
        pasts = {g.past for g in growths_of(graph)}
        grown = differences.externals - pasts
        if (grown or differences.literals) and not pasts:
            raise NotSpecializableError("its sizes differ from run to run, and it grows no cache")
        masks = take_out_masks(graph, template, differences.literals, grown)
        rewrites = rewritten(graph)
        growths = growths_of(graph)
        if pasts != {g.past for g in growths}:
            raise NotSpecializableError("rewriting it hid its caches")
        if growths:
            rewrites["kv"] = len(growths)
        bound, inputs = self._externals(lane, previous, call, pasts | grown)
        literals: list[int | None] = list(call.literals)
        for i in differences.literals:
            literals[i] = None
        program = Specialised(graph, growths, masks, [i for i, _ in inputs])
        counters = {"rewritten": sum(rewrites.values())} if rewrites else {}
        if self._pool is not None and "graph" in self.enabled:
            self._check_capturable(graph, inputs, call, previous.seen)
            addresses = tuple((i, as_tensor(call.values[i]).data_ptr(), g) for i, _, g in bound)
            key = (template.digest, tuple(literals), bits(call.floats), tuple(inputs), addresses)
            compiler = self._pool.compiler if "compiled" in self.enabled else None
            engine: Engine = Captured(program, self._pool, key, self._device, compiler)
            counters["engine_graph"] = 1
        elif rewrites:
            engine = InPlace(program, self._device)
        else:
            raise NotSpecializableError("there is nothing to rewrite")
        log.info("a template of %d ops runs as %s: %s", template.n_ops, engine.name, rewrites or "it is")
        varying = tuple(sorted(differences.literals))
        return Variant(literals, bits(call.floats), varying, bound, inputs, engine, counters)

    def _externals(
        self, lane: Lane, previous: Remembered, call: Call, but: set[int]
    ) -> tuple[list[tuple[int, weakref.ref, Geometry]], list[tuple[int, Geometry]]]:
        """Those that stay, and those that differ from run to run."""
        for old in lane.variants:
            lost = {i for i, ref, _ in old.bound if ref() is not call.values[i]}
            if 2 * len(lost) < len(old.bound):  # else it is another model
                lane.changing |= lost
        bound, inputs = [], []
        for i, (ref, value) in enumerate(zip(previous.refs, call.values, strict=True)):
            if i in but:
                continue
            if ref is not None and ref() is value and i not in lane.changing:
                bound.append((i, ref, Geometry.of(value)))
            else:
                inputs.append((i, Geometry.of(value)))
        return bound, inputs

    def _check_capturable(
        self, graph: fx.Graph, inputs: list[tuple[int, Geometry]], call: Call, seen: Observation
    ) -> None:
        copied = sum(call.values[i].nbytes for i, _ in inputs)
        if copied > (1 << 20) and copied > COPIED_SHARE * sum(v.nbytes for v in call.values):
            raise NotSpecializableError(f"{copied >> 20} MiB of its externals differ from run to run")
        outside = {spec.storage for spec in seen.ext}
        kept: Any = graph.output_node().args[0]
        if any(k is not None and k.meta["spec"].storage in outside for k in kept):
            raise NotSpecializableError("a result shares memory with an external")
