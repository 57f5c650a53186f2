"""Measures probes on a device through a Genie session: a server's, or this process's own.

Seconds are those that the receipts state: execution alone, the device synchronized. A CPU device of one
core is timed by the CPU-seconds of its process: the same on a core of its own, and not longer when other
processes take the core for a while. One op is repeated in one program, so that what a program costs
beside its ops is spread over many.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor

from genie.cost.fit import Sample
from genie.cost.programs import Probe
from genie.errors import RemoteOpError
from genie.frontend.program import Executor, Outcome, Program
from genie.frontend.session import Session
from genie.frontend.specs import spec_of, to_wire
from genie.runtime.link import ServerLink
from genie.srg.build import External, build
from genie.srg.graph import Node, Origin
from genie.wire.messages import TensorSpec

#: programs that each probe is timed with
ROUNDS = 3
#: calls of one op in a program: below what an executor hands over by itself
MAX_CALLS = 96
#: what one program is to take: much more than the clock's and the program's own cost
PROGRAM_S = 3e-3
#: the same where weights have to come from memory
COLD_PROGRAM_S = 15e-3
#: guesses, to choose how often an op is repeated before anything is known
_GUESS = {"cpu": (4e10, 8e9, 8e-6), "cuda": (2e13, 1e12, 1e-5)}
_ACTIVATIONS = 1 << 24
_PATTERN = 1 << 17
#: (elements, buffers): for weights up to that size so many, together well beyond the caches
_POOLS = ((160_000, 96), (640_000, 32), (2_400_000, 8), (6_300_000, 4), (38_600_000, 1))
_LARGE_BLOCK = 31 << 20


class Watched:
    """An executor that passes everything on, and keeps the graph of what passes while ``watching``."""

    def __init__(self, executor: Executor, spent_s: Callable[[], float]) -> None:
        self.executor = executor
        self.inline_bytes, self.chunk = executor.inline_bytes, executor.chunk
        self.spent_s = spent_s
        self.watching = True
        self.nodes: list[Node] = []
        self._specs: dict[int, TensorSpec] = {}

    def upload(self, handle: int, tensor: Tensor, is_parameter: bool) -> None:
        self._specs[handle] = to_wire(spec_of(tensor))
        self.executor.upload(handle, tensor, is_parameter)

    def execute(self, program: Program, fetch: list[int], describe: list[int]) -> Outcome:
        if self.watching:
            self._watch(program, fetch)
        for handle in program.release:
            self._specs.pop(handle, None)
        return self.executor.execute(program, fetch, describe)

    def _watch(self, program: Program, fetch: list[int]) -> None:
        for handle, tensor in program.inputs:
            self._specs[handle] = to_wire(spec_of(tensor))
        given = [External(self._specs[h], Origin.EARLIER) for h in program.ext]
        graph = build(program, given, fetch)
        self.nodes += graph.nodes
        for handle in program.kept_handles():
            spec = graph.wiring.spec[handle - program.base]
            if spec is not None:
                self._specs[handle] = spec

    def close(self) -> None:
        self.executor.close()


def in_process(device: str | torch.device = "cpu") -> Watched:
    """Measures this process's own device (pin the process first, see `genie.devices`)."""
    from genie.runtime.in_process import InProcessExecutor

    executor = InProcessExecutor(torch.device(device))
    one_core = executor.device.type == "cpu" and torch.get_num_threads() == 1
    clock = time.process_time if one_core else time.perf_counter
    spent = 0.0
    execute = executor.execute

    def timed(program: Program, fetch: list[int], describe: list[int]) -> Outcome:
        nonlocal spent
        executor.synchronize()
        before = clock()
        outcome = execute(program, fetch, describe)
        executor.synchronize()
        spent += clock() - before
        return outcome

    executor.execute = timed  # type: ignore[method-assign]
    return Watched(executor, lambda: spent)


def remote(link: ServerLink) -> Watched:
    """Measures the server behind ``link``, which must have no other use until the measurement ends."""
    from genie.runtime.remote import ResidentExecutor

    facts = link.connection.welcome.facts
    if facts.type == "cpu" and facts.cores == 1:
        return Watched(ResidentExecutor(link), lambda: link.usage.cpu_s)
    return Watched(ResidentExecutor(link), lambda: link.timings.remote)


def measure(
    executor: Watched,
    device_type: str,
    dtypes: Sequence[torch.dtype],
    probes: Sequence[Probe],
    rounds: int = ROUNDS,
    done: Callable[[], None] = lambda: None,
) -> list[Sample]:
    """One sample for each dtype and probe, in order: the median of ``rounds`` programs.

    ``executor`` is closed at the end; ``done`` is called after each program.

    All probes are run once before any is run again, so that what disturbs the machine for a moment does
    not fall on all measurements of one op. An op that the device does not have in a dtype gives no
    sample. Raises ValueError for no round, and what the session raises when the server is lost.
    """
    if rounds < 1:
        raise ValueError(f"rounds={rounds}: measure at least once")
    samples = []
    with Session(executor) as session, torch.no_grad():
        for dtype in dtypes:
            operands = _Operands(device_type, dtype)
            empty_s = statistics.median(_timed(session, executor, _nothing) for _ in range(9))
            found = [r for p in probes if (r := _prepared(session, executor, operands, p)) is not None]
            for _ in range(rounds):
                for repeated in found:
                    repeated.seconds.append(_timed(session, executor, repeated) - empty_s)
                    done()
            name = str(dtype)[6:]
            samples += [
                Sample(r.probe.label, r.nodes, r.each, name, r.probe.held_out) for r in found if r.each > 0
            ]
    return samples


@dataclass
class _Repeated:
    """A probe with its operands on the device. ``nodes``: of one call."""

    probe: Probe
    sets: list[dict[str, Tensor]]
    nodes: tuple[Node, ...] = ()
    seconds: list[float] = field(default_factory=list)

    def __call__(self) -> None:
        for tensors in self.sets:
            self.probe.call(tensors)

    @property
    def each(self) -> float:
        return statistics.median(self.seconds) / len(self.sets)


def _prepared(session: Session, executor: Watched, operands: _Operands, probe: Probe) -> _Repeated | None:
    executor.watching = True
    repeated = _Repeated(probe, operands.sets(probe, operands.calls(probe)))
    session.recorder.flush()
    executor.nodes = []
    try:
        _timed(session, executor, repeated)  # not timed: the template is compiled, and its results checked
    except RemoteOpError:
        return None
    executor.watching = False
    # One node more than the calls': the value that is read to synchronize.
    repeated.nodes = tuple(executor.nodes[: (len(executor.nodes) - 1) // len(repeated.sets)])
    return repeated


def _timed(session: Session, executor: Watched, run: Callable[[], Any]) -> float:
    """Seconds of execution of what ``run`` records, with what it takes to wait for it."""
    session.recorder.flush()
    before = executor.spent_s()
    run()
    session.synchronize()
    return executor.spent_s() - before


def _nothing() -> None:
    pass


class _Operands:
    """Views of buffers on the device; see `genie.cost.programs`.

    Each weight begins its buffer: so all weights of a probe have one geometry, and the op is captured once.
    """

    def __init__(self, device_type: str, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._rate, self._bandwidth, self._launch = _GUESS[device_type]
        self._pattern = torch.rand(_PATTERN, device="genie", dtype=dtype).sub_(0.5).mul_(0.1)
        self._pools: dict[int, list[Tensor]] = {}  # by elements of each, made when first needed
        self._activations = self._pattern.repeat(_ACTIVATIONS // _PATTERN)
        # glibc asks the kernel for each large block anew until the first one of its size was freed; a server
        # that has run for a while has done that.
        torch.zeros(_LARGE_BLOCK // dtype.itemsize, device="genie", dtype=dtype).add_(1)

    def _pool(self, probe: Probe) -> list[Tensor]:
        """Buffers for the probe's largest weight."""
        needed = max(prod(s) for s in probe.weights.values())
        for elements, count in _POOLS:
            if needed <= elements:
                if elements not in self._pools:
                    self._pools[elements] = [
                        self._pattern.repeat(-(-elements // _PATTERN)) for _ in range(count)
                    ]
                return self._pools[elements]
        raise ValueError(f"the weights of {probe.label!r} are larger than any that can be measured")

    def calls(self, probe: Probe) -> int:
        """So many that a program is long enough, and its weights do not fit into caches."""
        size, weights = self.dtype.itemsize, probe.weight_elements
        elements = probe.elements - (weights if probe.ids else 0)
        each = self._launch + max(probe.flops / self._rate, elements * size / self._bandwidth)
        calls = PROGRAM_S / each
        if probe.ids or weights * size / self._bandwidth > 0.03 * each:
            calls = max(calls, min(len(self._pool(probe)), COLD_PROGRAM_S / each))
        return max(1, min(MAX_CALLS, round(calls)))

    def sets(self, probe: Probe, calls: int) -> list[dict[str, Tensor]]:
        """The operands of each call: activations are the same, the largest weight another in turn."""
        given = {}
        at = 0
        largest = max(probe.weights, key=lambda name: prod(probe.weights[name]), default="")
        for name, shape in (probe.inputs | probe.weights).items():
            if name in probe.ids:
                given[name] = self._token_ids(shape, probe.ids[name])
            elif name != largest:
                given[name] = self._activations[at : at + prod(shape)].view(shape)
                at += _aligned(prod(shape))
        if not largest:
            return [given] * calls
        shape, buffers = probe.weights[largest], self._pool(probe)
        weights = [b[: prod(shape)].view(shape) for b in buffers[:calls]]
        return [{**given, largest: weights[k % len(weights)]} for k in range(calls)]

    def _token_ids(self, shape: tuple[int, ...], below: int) -> Tensor:
        source = torch.Generator().manual_seed(below)
        return torch.randint(below, shape, generator=source).to("genie")


def _aligned(elements: int) -> int:
    """Operands begin at cache lines, as tensors of their own do."""
    return -(-elements // 64) * 64
