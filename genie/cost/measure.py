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
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

import torch
from torch import Tensor

from genie.cost.fit import Sample
from genie.cost.programs import Probe
from genie.cost.sizing import Buffers, aligned, calls, largest_weight, sizing
from genie.device_facts import DeviceFacts
from genie.errors import OutOfMemoryError, RemoteOpError
from genie.frontend.program import Executor, Outcome, Program
from genie.frontend.session import Session
from genie.frontend.specs import spec_of, to_wire
from genie.runtime.link import ServerLink
from genie.srg.build import External, build
from genie.srg.graph import Node, Origin
from genie.wire.messages import TensorSpec

#: programs that each probe is timed with, at the most and before two of them may be enough
ROUNDS = 3
#: two rounds that are no farther apart need no third
_AGREE = 0.03
_LARGE_BLOCK = 31 << 20


class Watched:
    """An executor that passes everything on, and keeps the graph of what passes while ``watching``."""

    def __init__(self, executor: Executor, spent_s: Callable[[], float], memory_limit: int = 0) -> None:
        self.executor = executor
        self.inline_bytes, self.chunk = executor.inline_bytes, executor.chunk
        self.spent_s = spent_s
        self.memory_limit = memory_limit
        self.watching = True
        self.nodes: list[Node] = []
        self.programs: list[Sent] = []
        self._specs: dict[int, TensorSpec] = {}
        self._fetch: list[int] = []

    def upload(self, handle: int, tensor: Tensor, is_parameter: bool) -> None:
        self._specs[handle] = to_wire(spec_of(tensor))
        self.executor.upload(handle, tensor, is_parameter)

    def execute(self, program: Program, fetch: list[int], describe: list[int]) -> Outcome:
        if self.watching:
            self._watch(program, fetch)
        for handle in program.release:
            self._specs.pop(handle, None)
        fetch = fetch or [program.base + slot for slot in self._fetch]
        return self.executor.execute(program, fetch, describe)

    def _watch(self, program: Program, fetch: list[int]) -> None:
        for handle, tensor in program.inputs:
            self._specs[handle] = to_wire(spec_of(tensor))
        given = [External(self._specs[h], Origin.EARLIER) for h in program.ext]
        graph = build(program, given, fetch)
        self.nodes += graph.nodes
        self.programs.append(Sent(program, [handle - program.base for handle in fetch]))
        for handle in program.kept_handles():
            spec = graph.wiring.spec[handle - program.base]
            if spec is not None:
                self._specs[handle] = spec

    def run_again(self, session: Session, sent: Sent) -> None:
        """Hands over a program that was watched, and waits for it. Recording it costs the client some
        20 us an op, and there are tens of thousands of calls."""
        recorder = session.recorder
        recorder.flush()
        program = replace(sent.program, fresh=[])
        self._fetch = sent.fetch
        try:
            recorder.submit(program, sent)
        finally:
            self._fetch = []
        recorder.dead += [program.base + slot for slot in sent.fetch]

    def close(self) -> None:
        self.executor.close()


@dataclass(frozen=True)
class Sent:
    """A program, and the slots that are read back of it."""

    program: Program
    fetch: list[int]

    def describe(self, instruction: int) -> None:
        """No line of a user's recorded it."""


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

    welcome = link.connection.welcome
    clock = (lambda: link.usage.cpu_s) if in_cpu_seconds(welcome.facts) else (lambda: link.timings.remote)
    return Watched(ResidentExecutor(link), clock, welcome.memory_limit)


def in_cpu_seconds(facts: DeviceFacts) -> bool:
    """Whether the device of ``facts`` is timed by the CPU-seconds of its process, not by wall clock."""
    return facts.type == "cpu" and facts.cores == 1


def measure(
    executor: Watched,
    device_type: str,
    dtypes: Sequence[torch.dtype],
    probes: Sequence[Probe],
    rounds: int = ROUNDS,
    done: Callable[[], None] = lambda: None,
) -> list[Sample]:
    """One sample for each dtype and probe, in order: the median of up to ``rounds`` programs.

    ``executor`` is closed at the end; ``done`` is called ``rounds`` times for each probe and dtype.

    All probes are run once before any is run again, so that what disturbs the machine for a moment does
    not fall on all measurements of one op. An op that the device does not have in a dtype, or has no
    memory for, gives no sample. Raises ValueError for no round, and what the session raises when the
    server is lost.
    """
    if rounds < 1:
        raise ValueError(f"rounds={rounds}: measure at least once")
    samples = []
    with Session(executor) as session, torch.no_grad():
        for dtype in dtypes:
            sized = sizing(probes, device_type, dtype.itemsize, executor.memory_limit)
            samples += _measure(
                session, executor, _Operands(device_type, dtype, sized.buffers), sized.probes, rounds, done
            )
            for _ in range(rounds * (len(probes) - len(sized.probes))):
                done()
            session.synchronize()  # frees the buffers: those of the next dtype need the room
    return samples


def _measure(
    session: Session,
    executor: Watched,
    operands: _Operands,
    probes: Sequence[Probe],
    rounds: int,
    done: Callable[[], None],
) -> list[Sample]:
    """Of one dtype."""
    executor.watching = True
    empty_s = statistics.median(_timed(session, executor, _nothing) for _ in range(9))
    found = [r for p in probes if (r := _prepared(session, executor, operands, p)) is not None]
    for _ in range(rounds):
        for repeated in found:
            if not repeated.settled:
                repeated.seconds.append(_again(session, executor, repeated) - empty_s)
            done()
    for _ in range(rounds * (len(probes) - len(found))):
        done()
    name = str(operands.dtype)[6:]
    return [Sample(r.probe.label, r.nodes, r.each, name, r.probe.held_out) for r in found if r.each > 0]


@dataclass
class _Repeated:
    """A probe with its operands on the device. ``nodes``: of one call."""

    probe: Probe
    sets: list[dict[str, Tensor]]
    nodes: tuple[Node, ...] = ()
    seconds: list[float] = field(default_factory=list)
    sent: Sent | None = None

    def __call__(self) -> None:
        for tensors in self.sets:
            self.probe.call(tensors)

    @property
    def settled(self) -> bool:
        found = self.seconds
        return len(found) > 1 and max(found) - min(found) <= _AGREE * min(found)

    @property
    def each(self) -> float:
        return statistics.median(self.seconds) / len(self.sets)


def _prepared(session: Session, executor: Watched, operands: _Operands, probe: Probe) -> _Repeated | None:
    executor.watching = True
    repeated = _Repeated(probe, operands.sets(probe))
    session.recorder.flush()
    executor.nodes, executor.programs = [], []
    try:
        _timed(session, executor, repeated)  # not timed: the template is compiled, and its results checked
    except (RemoteOpError, OutOfMemoryError):
        return None
    finally:
        executor.watching = False
    # One node more than the calls': the value that is read to synchronize.
    repeated.nodes = tuple(executor.nodes[: (len(executor.nodes) - 1) // len(repeated.sets)])
    if len(executor.programs) == 1:
        repeated.sent = executor.programs[0]
    return repeated


def _again(session: Session, executor: Watched, repeated: _Repeated) -> float:
    if repeated.sent is None:  # a probe of several nodes was cut
        return _timed(session, executor, repeated)
    before = executor.spent_s()
    executor.run_again(session, repeated.sent)
    return executor.spent_s() - before


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
    """Views of buffers on the device; see `genie.cost.programs` and `genie.cost.sizing`.

    Each weight begins its buffer: so all weights of a probe have one geometry, and the op is captured once.
    """

    def __init__(self, device_type: str, dtype: torch.dtype, buffers: Buffers) -> None:
        self.device_type, self.dtype, self.buffers = device_type, dtype, buffers
        self._pattern = torch.rand(buffers.pattern, device="genie", dtype=dtype).sub_(0.5).mul_(0.1)
        self._pools: dict[int, list[Tensor]] = {}  # made when first needed
        self._activations = self._repeat(buffers.activations)
        if device_type == "cpu":
            # glibc asks the kernel for each large block anew until the first one of its size was freed; a
            # server that has run for a while has done that.
            torch.zeros(_LARGE_BLOCK // dtype.itemsize, device="genie", dtype=dtype).add_(1)

    def _repeat(self, elements: int) -> Tensor:
        return self._pattern.repeat(-(-elements // self.buffers.pattern))

    def _pool(self, probe: Probe) -> list[Tensor]:
        """Buffers for the probe's largest weight."""
        number = self.buffers.pool(probe)
        if number not in self._pools:
            elements, count = self.buffers.pools[number]
            self._pools[number] = [self._repeat(elements) for _ in range(count)]
        return self._pools[number]

    def sets(self, probe: Probe) -> list[dict[str, Tensor]]:
        """The operands of each call: activations are the same, the largest weight another in turn."""
        number = calls(probe, self.device_type, self.dtype, self.buffers)
        given = {}
        at = 0
        largest = largest_weight(probe)
        for name, shape in (probe.inputs | probe.weights).items():
            if name in probe.ids:
                given[name] = self._token_ids(shape, probe.ids[name])
            elif name != largest:
                given[name] = self._activations[at : at + prod(shape)].view(shape)
                at += aligned(prod(shape))
        if not largest:
            return [given] * number
        shape, pool = probe.weights[largest], self._pool(probe)
        weights = [b[: prod(shape)].view(shape) for b in pool[:number]]
        return [{**given, largest: weights[k % len(weights)]} for k in range(number)]

    def _token_ids(self, shape: tuple[int, ...], below: int) -> Tensor:
        source = torch.Generator().manual_seed(below)
        return torch.randint(below, shape, generator=source).to("genie")
