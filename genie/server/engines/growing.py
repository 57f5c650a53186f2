"""Engines for specialised programs: generated Python, and CUDA graphs of it. Both grow caches in place."""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import torch
from torch import Tensor, fx

from genie.server.engines.emit import Run, emit
from genie.server.engines.graphs import GraphPool, Instance
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
from genie.server.engines.variants import Call, Specialised


class _Growing:
    """Which buffers a call continues, and the kept values in their order."""

    def __init__(self, program: Specialised) -> None:
        self._program = program
        self._growths = program.growths
        self._n_kept = len(program.graph.output_node().args[0])  # type: ignore[arg-type]

    def _pasts(self, call: Call) -> tuple[list[Value], int]:
        """The caches and their length, -1 where they are not of one length."""
        pasts = [call.values[g.past] for g in self._growths]
        lengths = {p.shape[2] for p in pasts}
        return pasts, lengths.pop() if len(lengths) == 1 else -1

    def _continued(self, pasts: Sequence[Value]) -> Buffers | None:
        """The buffers in which all the pasts live, if the next position may be written there."""
        first = pasts[0]
        if not isinstance(first, State):
            return None
        step = first.step
        buffers = step.buffers
        if buffers.length != step.length or step.length >= buffers.capacity:
            return None
        for k, past in enumerate(pasts):
            if not isinstance(past, State) or past.step is not step or past.index != k:
                return None
        return buffers

    def _masks(self, call: Call, length: int) -> list[Tensor] | None:
        masks = self._program.masks
        if masks is None:
            return []
        made = masks.run(call.values, call.literals, call.floats)
        return made if all(m.shape[1:] == (1, 1, length + 1) for m in made) else None

    def _merged(self, rest: Sequence[Tensor | None], buffers: Buffers, length: int) -> list[Value | None]:
        step = Step(buffers, length)
        places = {g.kept: k for k, g in enumerate(self._growths)}
        others = iter(rest)
        return [State(step, places[k]) if k in places else next(others) for k in range(self._n_kept)]


class InPlace(_Growing):
    """The rewritten program as generated Python."""

    name = "rewritten"
    reads_in_place = False

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

    def __init__(self, program: Specialised, pool: GraphPool, key: tuple, device: torch.device) -> None:
        """``key``: equal for programs that compute the same from what lies at the same addresses."""
        super().__init__(program)
        self._pool, self._key, self._device = pool, key, device
        self._runs: dict[int, Run] = {}

    def run(self, call: Call) -> list[Value | None] | None:
        inputs: list[Tensor] = [call.values[i] for i in self._program.inputs]  # type: ignore[misc]
        if not self._growths:
            return list(self._instance(call, 0).replay(inputs))
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
        return self._merged(instance.replay(inputs, length), buffers, length + 1)

    def _instance(self, call: Call, capacity: int) -> Instance:
        key = (self._key, capacity)
        found = self._pool.find(key)
        return found if found is not None else self._pool.add(key, lambda: self._make(call, capacity))

    def _make(self, call: Call, capacity: int) -> Instance:
        args: list = list(call.values)
        inputs: list[Tensor] = []
        for i in self._program.inputs:
            # Indices must be in bounds in the run before the capture, too.
            args[i] = as_tensor(args[i]).clone()
            inputs.append(args[i])
        buffers, masks, position = None, [], None
        if capacity:
            buffers = Buffers(self._growths, capacity, self._device)
            for g, buffer in zip(self._growths, buffers.tensors, strict=True):
                args[g.past] = buffer
            if self._program.masks is not None:
                for spec, dtype in self._program.masks.specs:
                    shape = (spec.shape[0], 1, 1, capacity)
                    masks.append(torch.zeros(shape, dtype=dtype, device=self._device))
            position = torch.zeros(1, dtype=torch.int64, device=self._device)
            args.extend((*masks, position))
        capture = self._pool.capture
        return Instance(self._emitted(capacity), args, inputs, buffers, masks, position, capture)

    def _emitted(self, capacity: int) -> Run:
        run = self._runs.get(capacity)
        if run is None:
            graph = fx.Graph()
            graph.output(graph.graph_copy(self._program.graph, {}))
            if capacity:
                grow_at_fixed_shapes(graph, self._growths, capacity)
            run = self._runs[capacity] = emit(graph)
        return run
