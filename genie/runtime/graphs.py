"""The annotated graphs of an executor's templates: built once each, then looked up."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from dataclasses import replace

from torch import Tensor

from genie.frontend.program import Program
from genie.frontend.specs import spec_of, to_wire
from genie.semantics import kv_cache
from genie.semantics.annotate import annotate_in_place
from genie.srg.build import External, build
from genie.srg.graph import Graph, Origin
from genie.wire.messages import TensorSpec

#: a template's code and kept slots, whether it processes one token at a time, and what is annotated of it
GraphKey = tuple[bytes, bytes, bool, tuple]


def graph_of(
    program: Program,
    specs: Sequence[TensorSpec],
    handles: Sequence[int],
    parameters: Collection[int],
    fetch: Sequence[int] = (),
) -> Graph:
    """The annotated graph of ``program``, which may be several that were merged.

    ``specs`` and ``handles`` are those of its externals, in order; ``parameters`` the handles of all
    uploaded Parameters; ``fetch`` the handles that the client reads. What the weights are called, and what
    `genie.annotate_phase` says of them, comes from ``program.weight_names``; its blocks are looked up from
    instruction ``program.first`` on. Sizes are those of this very call, compiled or not.
    """
    if program.concrete is not None:
        program = replace(program, entries=program.concrete()[0])
    names = program.weight_names
    externals = []
    for handle, spec in zip(handles, specs, strict=True):
        owners = () if names is None else names.of(handle)
        if handle in parameters or (owners and owners[0].parameter):
            origin = Origin.PARAMETER
        else:
            origin = Origin.HOST if handle < 0 else Origin.EARLIER
        externals.append(External(spec, origin, owners))
    blocks = () if names is None else names.within(program.first, len(program.entries))
    return annotate_in_place(build(program, externals, fetch, blocks))


def hints_of(program: Program) -> tuple:
    """What `genie.annotate_phase` says of this program: equal templates with other annotations have other
    graphs. () where nothing is annotated, at no cost."""
    names = program.weight_names
    return () if names is None else names.hints(program.ext, program.first, len(program.entries))


class TemplateGraphs:
    """``graphs`` holds the last ``limit`` of them, ``spent_s`` the seconds spent on building them.

    A template does not fix its sizes: over a static KV cache, a prompt's chunk and a single token can
    be one template, and yet prefill and decode. So a template that grows a cache has up to two graphs.
    Names are those of the weights that it was first seen with.
    """

    def __init__(self, limit: int) -> None:
        self.graphs: dict[GraphKey, Graph] = {}
        self.spent_s = 0.0
        self._limit = limit
        self._length_at: dict[tuple[bytes, bytes], tuple[int, int, int] | None] = {}

    def unseen(self, program: Program) -> bool:
        return program.key not in self._length_at or self.key(program) not in self.graphs

    def key(self, program: Program) -> GraphKey:
        """Raises KeyError for a template that was never added."""
        at = self._length_at[program.key]
        one_token = at is not None and _length(program, at) == 1
        return (*program.key, one_token, hints_of(program))

    def add(
        self,
        program: Program,
        externals: Sequence[Tensor],
        parameters: Collection[int],
        fetch: Sequence[int],
    ) -> Graph:
        """Builds and annotates. ``externals`` are the tensors behind ``program.ext``, ``parameters`` the
        handles of all uploaded Parameters."""
        started = time.perf_counter()
        specs = [to_wire(spec_of(t)) for t in externals]
        graph = graph_of(program, specs, program.ext, parameters, fetch)
        if len(self.graphs) >= self._limit:
            old = next(iter(self.graphs))
            del self.graphs[old]
            self._length_at.pop(old[:2], None)
        self._length_at[program.key] = kv_cache.query_length_at(graph)
        self.graphs[self.key(program)] = graph
        self.spent_s += time.perf_counter() - started
        return graph


def _length(program: Program, at: tuple[int, int, int]) -> int:
    instruction, output, dim = at
    return program.entries[instruction].outs[output].shape[dim]
