"""Engines for specialised programs: generated Python, and CUDA graphs of it. Both grow caches in place."""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import torch
from torch import Tensor, fx

from genie.server.engines.emit import Run, emit
from genie.server.engines.graphs import CaptureError, GraphPool, Instance
from genie.server.engines.inductor import Compiler
from genie.server.engines.kv import (
    Buffers,
    State,
    Step,
    Value,
    as_tensor,
    capacity_for,
    grow_at_fixed_shapes,
    grow_in_place,
)
from genie.server.engines.masks import fill
from genie.server.engines.tiers import Tiers
from genie.server.engines.variants import Call, Specialised
from genie.server.faults import is_device_lost


def _one_step(pasts: Sequence[Value]) -> Step | None:
    """The step whose states they all are, in order."""
    first = pasts[0]
    step = first.step if isinstance(first, State) else None
    if step is None or len(step.buffers.tensors) != len(pasts):
        return None
    for k, past in enumerate(pasts):
        if not isinstance(past, State) or past.step is not step or past.index != k:
            return None
    return step


class _Growing:
    """Which buffers a call continues, and the kept values in their order."""

    def __init__(self, program: Specialised) -> None:
        self._program = program
        self._growths = program.growths
        self._places = {g.kept: k for k, g in enumerate(program.growths)}
        self._n_kept = len(program.graph.output_node().args[0])  # type: ignore[arg-type]

    def _pasts(self, call: Call) -> tuple[list[Value], int]:
        """The caches and their length, -1 where they are not of one length, or not what was observed."""
        values = call.values
        pasts = [values[g.past] for g in self._growths]
        step = _one_step(pasts)
        if step is not None and step.buffers.growths is self._growths:
            return pasts, step.length  # these were made for this program
        lengths = {p.shape[2] for p in pasts}
        fit = len(lengths) == 1 and all(g.takes(p) for g, p in zip(self._growths, pasts, strict=True))
        return pasts, lengths.pop() if fit else -1

    def _continued(self, pasts: Sequence[Value]) -> Buffers | None:
        """The buffers in which all the pasts live, if the next position may be written there."""
        step = _one_step(pasts)
        if step is None:
            return None
        buffers = step.buffers
        if buffers.length != step.length or step.length >= buffers.capacity:
            return None
        return buffers

    def _masks(self, call: Call, length: int) -> list[Tensor] | None:
        masks = self._program.masks
        if masks is None:
            return []
        made = masks.run(call.values, call.literals, call.floats)
        return made if all(m.shape[2:] == (1, length + 1) for m in made) else None

    def _merged(self, rest: Sequence[Tensor | None], buffers: Buffers, length: int) -> list[Value | None]:
        step = Step(buffers, length)
        places, others = self._places, iter(rest)
        return [State(step, places[k]) if k in places else next(others) for k in range(self._n_kept)]


class InPlace(_Growing):
    """The rewritten program as generated Python."""

    name = "rewritten"
    reads_in_place = False
    compiled = False

    def __init__(self, program: Specialised, device: torch.device) -> None:
        super().__init__(program)
        self._device = device
        if self._growths:
            grow_in_place(program.graph, self._growths)
        self._run: Run = emit(program.graph)

    def run(self, call: Call) -> list[Value | None] | None:
        if not self._growths:
            return list(self._run([as_tensor(v) for v in call.values]))
        pasts, length = self._pasts(call)
        masks = self._masks(call, length) if length >= 0 else None
        if masks is None:
            return None
        buffers = self._continued(pasts)
        if buffers is None:
            buffers = Buffers(self._growths, capacity_for(length), self._device)
            buffers.load(pasts)
        args: list = [*call.values, *masks, length]
        for g, buffer in zip(self._growths, buffers.tensors, strict=True):
            args[g.past] = buffer
        return self._merged(self._run(args), buffers, length + 1)


class Captured(_Growing):
    """The rewritten program as CUDA graphs, one for each capacity of its caches and generation at a time."""

    name = "graph"
    reads_in_place = True

    def __init__(
        self, program: Specialised, pool: GraphPool, key: tuple, device: torch.device,
        compiler: Compiler | None = None,
    ) -> None:  # fmt: skip
        """``key``: equal for programs that compute the same from what lies at the same addresses."""
        super().__init__(program)
        self._pool, self._key, self._device = pool, key, device
        self._runs: dict[int, Run] = {}
        self._tiers = Tiers(compiler)
        self._replaced: set[tuple] = set()  # keys of instances to let go of as soon as they are free

    @property
    def compiled(self) -> bool:
        return self._tiers.compiled

    @property
    def wants_time(self) -> bool:
        """Whether `took` is to be told."""
        return self._tiers.wants_time

    def took(self, seconds: float) -> None:
        """How long the run before took."""
        if not self._tiers.took(seconds):
            self._replaced.add((self._key, self._tiers.capacity, "compiled"))

    def run(self, call: Call) -> list[Value | None] | None:
        inputs: list[Tensor] = [call.values[i] for i in self._program.inputs]  # type: ignore[misc]
        if not self._growths:
            plain = self._instance(call, 0)
            made = plain.replay(inputs)
            self._replayed(call, plain, 0)
            return list(made)
        pasts, length = self._pasts(call)
        masks = self._masks(call, length) if length >= 0 else None
        if masks is None:
            return None
        buffers = self._continued(pasts)
        instance = buffers.owner() if buffers is not None and buffers.owner is not None else None
        if buffers is None or instance is None or instance.program is not self:
            instance = self._instance(call, capacity_for(length))
            buffers = instance.buffers
            assert buffers is not None
            instance.program, buffers.owner = self, weakref.ref(instance)
            buffers.load(pasts)
        for mine, mask in zip(instance.masks, masks, strict=True):
            fill(mine, mask)
        rest = instance.replay(inputs, length)
        self._replayed(call, instance, buffers.capacity)
        return self._merged(rest, buffers, length + 1)

    def _replayed(self, call: Call, instance: Instance, capacity: int) -> None:
        if self._replaced:
            self._replaced = {key for key in self._replaced if not self._pool.drop(key)}
        # What it ran with is still in its buffers: once more writes the same to the same place.
        self._tiers.ran(
            capacity,
            instance.compiled,
            lambda: (self._at_capacity(capacity), self._arguments(call, instance)),
        )

    def _instance(self, call: Call, capacity: int) -> Instance:
        plain, compiled = (self._key, capacity), (self._key, capacity, "compiled")
        run = self._tiers.run(capacity)
        if run is None:
            return self._found_or_made(plain, call, capacity, self._emitted(capacity))
        self._replaced.add(plain)
        try:
            instance = self._found_or_made(compiled, call, capacity, run)
            reason = self._disagreement(call, instance, capacity)
        except (CaptureError, RuntimeError) as exc:  # of which torch's OutOfMemoryError is one
            if is_device_lost(exc):
                raise
            reason = f"{type(exc).__name__}: {exc}"
        if not reason:
            instance.compiled = True
            return instance
        self._tiers.give_up(capacity, reason)
        self._replaced = {compiled}
        return self._found_or_made(plain, call, capacity, self._emitted(capacity))

    def _disagreement(self, call: Call, instance: Instance, capacity: int) -> str:
        if self._tiers.verified(capacity):
            return ""
        state = [*instance.masks, *([] if instance.position is None else [instance.position])]
        for tensor in state:
            tensor.zero_()
        buffers = instance.buffers.tensors if instance.buffers is not None else []
        return self._tiers.verify(capacity, self._emitted(capacity), self._arguments(call, instance), buffers)

    def _found_or_made(self, key: tuple, call: Call, capacity: int, run: Run) -> Instance:
        found = self._pool.find(key)
        return found if found is not None else self._pool.add(key, lambda: self._make(call, capacity, run))

    def _make(self, call: Call, capacity: int, run: Run) -> Instance:
        # Indices must be in bounds in the run before the capture, too.
        inputs = [as_tensor(call.values[i]).clone() for i in self._program.inputs]
        buffers, masks, position = None, [], None
        if capacity:
            buffers = Buffers(self._growths, capacity, self._device)
            if self._program.masks is not None:
                for spec, dtype in self._program.masks.specs:
                    shape = (*spec.shape[:2], 1, capacity)
                    masks.append(torch.zeros(shape, dtype=dtype, device=self._device))
            position = torch.zeros(1, dtype=torch.int64, device=self._device)
        args = self._bound(call, inputs, buffers, masks, position)
        return Instance(run, args, inputs, buffers, masks, position, self._pool.capture)

    def _arguments(self, call: Call, instance: Instance) -> list[Tensor]:
        return self._bound(call, instance.inputs, instance.buffers, instance.masks, instance.position)

    def _bound(
        self, call: Call, inputs: Sequence[Tensor], buffers: Buffers | None, masks: Sequence[Tensor],
        position: Tensor | None,
    ) -> list[Tensor]:  # fmt: skip
        """What the placeholders at fixed shapes are bound to."""
        args: list = list(call.values)
        for i, mine in zip(self._program.inputs, inputs, strict=True):
            args[i] = mine
        if buffers is not None:
            for g, buffer in zip(self._growths, buffers.tensors, strict=True):
                args[g.past] = buffer
            args.extend((*masks, position))
        return args

    def _emitted(self, capacity: int) -> Run:
        run = self._runs.get(capacity)
        if run is None:
            run = self._runs[capacity] = emit(self._at_capacity(capacity))
        return run

    def _at_capacity(self, capacity: int) -> fx.Graph:
        graph = fx.Graph()
        graph.output(graph.graph_copy(self._program.graph, {}))
        if capacity:
            grow_at_fixed_shapes(graph, self._growths, capacity)
        return graph
