"""The annotated graphs of an executor's templates: built once each, then looked up."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence

from torch import Tensor

from genie.frontend.program import Program
from genie.frontend.specs import spec_of, to_wire
from genie.semantics import kv_cache
from genie.semantics.annotate import annotate
from genie.srg.build import External, build
from genie.srg.graph import Graph, Origin

#: a template's code and kept slots, and whether it processes one token at a time
GraphKey = tuple[bytes, bytes, bool]


class TemplateGraphs:
    """``graphs`` holds the last ``limit`` of them, ``spent_s`` the seconds spent on building them.

    A template does not fix its sizes: over a static KV cache, a prompt's chunk and a single token can
    be one template, and yet prefill and decode. So a template that grows a cache has up to two graphs.
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
        return (*program.key, at is not None and _length(program, at) == 1)

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
        described = [
            External(to_wire(spec_of(t)), _origin(h, parameters))
            for h, t in zip(program.ext, externals, strict=True)
        ]
        graph = annotate(build(program, described, fetch))
        if len(self.graphs) >= self._limit:
            old = next(iter(self.graphs))
            del self.graphs[old]
            self._length_at.pop(old[:2], None)
        self._length_at[program.key] = kv_cache.query_length_at(graph)
        self.graphs[self.key(program)] = graph
        self.spent_s += time.perf_counter() - started
        return graph


def _origin(handle: int, parameters: Collection[int]) -> Origin:
    if handle in parameters:
        return Origin.PARAMETER
    return Origin.HOST if handle < 0 else Origin.EARLIER


def _length(program: Program, at: tuple[int, int, int]) -> int:
    instruction, output, dim = at
    return program.entries[instruction].outs[output].shape[dim]
