"""What a program is cut into: what moves, after what, and what dies where."""

from __future__ import annotations

from array import array
from dataclasses import replace

import pytest
import torch

from genie.errors import PlanError
from genie.frontend.program import Program
from genie.runtime.slicing import Slicer
from genie.runtime.steps import Gather, Move, Narrow, Run
from genie.scheduler.plan import BatchAxes, BatchSplit
from genie.scheduler.where import Axis, Shard, Where
from genie.srg.graph import Graph
from tests.scheduler.batch_parts import caught

ROWS = (Shard(0, 0, 1), Shard(1, 1, 4))


def _program(run) -> tuple[Program, Graph]:
    """The program of ``run(x)``, whose instructions are numbered as they are called; x is external 0."""
    x = torch.arange(32.0).view(4, 8)
    case = max(caught(lambda: run(x.to("genie")).cpu()), key=lambda c: len(c.graph.nodes))
    return case.program, case.graph


def _slices(program: Program, graph: Graph, servers, split: BatchSplit | None = None):
    value = {v: v for v in range(-program.n_ext, program.n_slots)}
    return Slicer(program, servers, split, value, graph.wiring.spec, 0).slices()


def _split(graph: Graph) -> BatchSplit:
    axes = {v: Axis(0) for n in (*graph.externals, *graph.nodes) for v in n.outputs}
    return BatchSplit(BatchAxes(4, axes, {}), ROWS)


def test_a_value_moves_after_its_last_write() -> None:
    program, graph = _program(lambda x: (x * 2).add_(1).relu())
    steps = _slices(program, graph, [(0,), (0,), (1,)]).steps
    first, move, last = steps
    assert isinstance(first, Run) and first.numbers == [0, 1]
    assert isinstance(move, Move) and (move.slot, move.source, move.target) == (0, 0, 1)
    assert isinstance(last, Run) and last.numbers == [2] and last.release == [0]


def test_an_external_moves_after_it_was_written_to() -> None:
    program, graph = _program(lambda x: x.add_(1).relu())
    slices = _slices(program, graph, [(0,), (1,)])
    assert [n.servers for n in slices.needs] == [(0,)]  # and not on 1, where the old content would be
    assert [type(s) for s in slices.steps] == [Run, Move, Run]
    assert slices.homes == [(0, (0,))] and slices.leftover == {1: [-1]}


def test_what_is_read_elsewhere_before_its_last_write_is_refused() -> None:
    program, graph = _program(lambda x: (lambda y: (y.relu(), y.add_(1))[0])(x * 2))
    with pytest.raises(PlanError, match="writes to it later"):
        _slices(program, graph, [(0,), (1,), (0,)])


def test_rows_are_joined_for_one_server_and_divided_again() -> None:
    program, graph = _program(lambda x: (x * 2).softmax(0).relu())
    slices = _slices(program, graph, [(0, 1), (1,), (0, 1)], _split(graph))
    assert slices.needs[0].sharded == Where(axis=Axis(0), shards=ROWS)
    gathers = [s for s in slices.steps if isinstance(s, Gather)]
    narrows = [s for s in slices.steps if isinstance(s, Narrow)]
    moves = [s for s in slices.steps if isinstance(s, Move)]
    assert [(g.server, g.parts, g.own) for g in gathers] == [(1, 2, 1)]
    assert [(n.server, n.start, n.stop) for n in narrows] == [(1, 1, 4)]
    assert [(m.source, m.target, m.narrow, m.spec.shape) for m in moves] == [
        (0, 1, None, [1, 8]),
        (1, 0, (0, 0, 1), [1, 8]),
    ]
    done = [number for s in slices.steps if isinstance(s, Run) for number in s.done]
    assert sorted(done) == [0, 1, 2]


def test_an_external_may_be_needed_whole_and_by_rows() -> None:
    program, graph = _program(lambda x: x.relu() + x.softmax(0))
    slices = _slices(program, graph, [(0, 1), (0,), (0, 1)], _split(graph))
    assert slices.needs[0].servers == (0,)
    assert isinstance(slices.steps[0], Move) and slices.steps[0].narrow == (0, 1, 3)
    assert any(isinstance(s, Narrow) and (s.slot, s.server) == (-1, 0) for s in slices.steps)


def test_what_means_something_only_to_a_part_does_not_move() -> None:
    program, graph = _program(lambda x: (x * 2).softmax(0))
    split = _split(graph)
    split = replace(split, batch=replace(split.batch, local=frozenset({0})))
    with pytest.raises(PlanError, match="the part of the batch that made it"):
        _slices(program, graph, [(0, 1), (0,)], split)


def test_a_run_names_what_outlives_it() -> None:
    program, graph = _program(lambda x: (x * 2).relu().exp())
    slices = _slices(program, graph, [(0,), (1,), (0,)])
    names = [array("i", s.names).tolist() for s in slices.steps if isinstance(s, Run)]
    assert names == [[0], [1], array("i", program.key[1]).tolist()]
    assert [s.release for s in slices.steps if isinstance(s, Run)] == [[], [0], [0, 1]]
    assert slices.leftover == {1: [1]}  # sent away after the last run there
