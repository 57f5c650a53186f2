"""Records programs in this process and runs them by parts of the batch, against the whole run."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import msgspec
import torch
from torch import Tensor

from genie.frontend.entries import definition
from genie.frontend.program import Outcome, Program
from genie.frontend.session import Session
from genie.frontend.specs import spec_of, to_wire
from genie.runtime.in_process import InProcessExecutor
from genie.scheduler.batch_axis import part_literals, part_spec, prove
from genie.scheduler.plan import BatchAxes
from genie.server.engine import OpTable, compile_template
from genie.srg.build import External, build
from genie.srg.graph import Graph, Origin


@dataclass
class Caught:
    """A program as it ran: its graph, and the content of its externals before it ran."""

    program: Program
    graph: Graph
    externals: list[Tensor]

    def batch(self, inputs: Sequence[Tensor]) -> list[int]:
        """The value numbers of the externals that hold ``inputs`` (told by their random content)."""
        found = [
            -k - 1
            for k, t in enumerate(self.externals)
            if any(t.shape == x.shape and t.dtype == x.dtype and torch.equal(t, x) for x in inputs)
        ]
        assert found, "no input of the request is an external of this program"
        return found


class Recording(InProcessExecutor):
    """Executes as ever, and keeps what it executed."""

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))
        self.caught: list[Caught] = []
        self._fetch: list[int] = []

    def execute(self, program: Program, fetch: list[int], describe: list[int]) -> Outcome:
        self._fetch = fetch
        return super().execute(program, fetch, describe)

    def _run(self, template, ext, program, tick):  # type: ignore[no-untyped-def]
        before = [t.clone(memory_format=torch.preserve_format) for t in ext]
        described = [External(to_wire(spec_of(t)), Origin.HOST) for t in ext]
        self.caught.append(Caught(program, build(program, described, self._fetch), before))
        return super()._run(template, ext, program, tick)


def caught(run: Callable[[], object], *, replay: bool = False) -> list[Caught]:
    """Every program that ``run`` makes on device genie, in order."""
    executor = Recording()
    with torch.no_grad(), Session(executor, replay=replay):
        run()
    return executor.caught


def largest(run: Callable[[], object]) -> Caught:
    return max(caught(run), key=lambda c: len(c.graph.nodes))


def proven(case: Caught, inputs: Sequence[Tensor]) -> BatchAxes:
    axes = prove(case.graph, case.batch(inputs))
    assert isinstance(axes, BatchAxes), axes
    return axes


def check_parts(case: Caught, inputs: Sequence[Tensor], splits: Sequence[Sequence[int]]) -> BatchAxes:
    """Proves, then compares *every* value but the local ones: the parts' rows, joined, with the whole's."""
    axes = proven(case, inputs)
    program, graph = case.program, case.graph
    slots = array("i", range(program.n_slots)).tobytes()
    ops = OpTable(torch.device("cpu"))
    body = replace_kept(program.body([definition(t) for t in program.tids()]), slots)
    template = compile_template(body, ops, torch.device("cpu"))
    assert part_literals(graph, axes, axes.size) == list(program.literals)

    def run(start: int, rows: int) -> list[Tensor]:
        given = []
        for k, t in enumerate(case.externals):
            axis = axes.axes.get(-k - 1)
            if axis is not None:
                t = t.narrow(axis.dim, start * axis.inner, rows * axis.inner)
                spec = part_spec(to_wire(spec_of(case.externals[k])), axis, rows, axes.size)
                t = torch.empty_strided(spec.shape, spec.stride, dtype=t.dtype).copy_(t)
            given.append(t.clone(memory_format=torch.preserve_format))
        with torch.no_grad():
            return template.run(given, part_literals(graph, axes, rows), program.floats, [])[0]  # type: ignore[return-value]

    whole = run(0, axes.size)
    for split in splits:
        assert sum(split) == axes.size
        parts = [run(sum(split[:k]), rows) for k, rows in enumerate(split)]
        for value in range(program.n_slots):
            if value in axes.local:
                continue
            axis, expected = axes.axes.get(value), whole[value]
            where = f"value {value} of {split}: {graph.wiring.producer[value].op}"
            note = lambda text, where=where: f"{where}: {text}"  # noqa: E731
            if axis is None:
                for part in parts:
                    torch.testing.assert_close(part[value], expected, equal_nan=True, msg=note)
            else:
                for rows, part in zip(split, parts, strict=True):
                    assert part[value].shape[axis.dim] == rows * axis.inner, where
                joined = torch.cat([part[value] for part in parts], axis.dim)
                torch.testing.assert_close(joined, expected, equal_nan=True, rtol=1e-4, atol=1e-5, msg=note)
    return axes


def replace_kept(body, kept: bytes):  # type: ignore[no-untyped-def]
    return msgspec.structs.replace(body, kept=kept, names=b"")
