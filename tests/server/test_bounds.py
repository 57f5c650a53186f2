"""Which programs would index out of bounds, told before they run."""

from __future__ import annotations

import pytest
import torch

from genie.server.bounds import MAX_ELEMENTS, Bounds
from genie.server.engine import compile_template
from genie.server.ops import OpTable
from tests.server.programs import body

CPU = torch.device("cpu")
TABLE = torch.zeros(8, 4)
EMBEDDING = ("aten::embedding.default", [["t"], ["t"]])
ARANGE = ("aten::arange.start", [["i"], ["i"]], [])


def bounds(*calls, n_ext):
    return Bounds(compile_template(body(*calls, n_ext=n_ext, kept=[]), OpTable(CPU), CPU))


@pytest.mark.parametrize(("index", "holds"), [(7, True), (8, False), (-1, False)])
def test_an_index_from_outside_is_looked_at(index, holds):
    found = bounds((*EMBEDDING, [-1, -2]), n_ext=2)
    assert found.hold([TABLE, torch.tensor([[0, index]])], [], []) is holds


@pytest.mark.parametrize(("start", "holds"), [(0, True), (4, True), (5, False)])
def test_an_index_that_the_program_makes_is_computed(start, holds):
    """Positions, as models make them: arange(past, past + n) + 0."""
    found = bounds(
        ("aten::mul.Tensor", [["t"], ["t"]], [-1, -1]),
        ARANGE,
        ("aten::add.Scalar", [["t"], ["i"]], [1]),
        (*EMBEDDING, [-1, 2]),
        n_ext=1,
    )
    assert found.provable
    assert found.hold([TABLE], [start, start + 4, 0], []) is holds


@pytest.mark.parametrize(("row", "column", "holds"), [(7, -4, True), (8, 0, False), (0, -5, False)])
def test_several_indices_may_count_from_the_end(row, column, holds):
    found = bounds(("aten::index.Tensor", [["t"], ["ol", [1, 1]]], [-1, -2, -3]), n_ext=3)
    assert found.hold([TABLE, torch.tensor([row]), torch.tensor([column])], [], []) is holds


@pytest.mark.parametrize(("dim", "holds"), [(0, True), (1, False), (-1, False)])
@pytest.mark.parametrize("op", ["index_select", "gather"])
def test_the_dimension_counts(op, dim, holds):
    found = bounds((f"aten::{op}.default", [["t"], ["i"], ["t"]], [-1, -2]), n_ext=2)
    index = torch.tensor([5]) if op == "index_select" else torch.tensor([[5]])
    assert found.hold([TABLE, index], [dim], []) is holds


def test_an_index_that_is_written_to_is_not_proven():
    found = bounds(
        ("aten::add_.Tensor", [["t"], ["t"]], [-2, -2], [0]),
        (*EMBEDDING, [-1, -2]),
        n_ext=2,
    )
    assert not found.provable


def test_programs_without_indices_hold():
    assert bounds(("aten::add.Tensor", [["t"], ["t"]], [-1, -1]), n_ext=1).hold([TABLE], [], [])


@pytest.mark.parametrize(
    "calls",
    [
        [("aten::index_add.default", [["t"], ["i"], ["t"], ["t"]], [-1, -2, -1])],
        [
            ("aten::embedding.default", [["t"], ["t"]], [-1, -2]),
            (*EMBEDDING, [-1, 0]),
        ],  # indices of its own making
        [("aten::randint.default", [["i"], ["il", 1]], []), (*EMBEDDING, [-1, 0])],
        [("aten::add.Tensor", [["t"], ["t"]], [-2, -2])]
        + [("aten::add.Tensor", [["t"], ["t"]], [k, k]) for k in range(70)]
        + [(*EMBEDDING, [-1, 70])],
    ],
    ids=["unknown op", "index of an index", "random", "long"],
)
def test_what_cannot_be_told_does_not_hold(calls):
    found = bounds(*calls, n_ext=2)
    assert not found.provable
    assert not found.hold([TABLE, torch.zeros(1, dtype=torch.int64)], [0] * 80, [])


def test_large_indices_and_masks_are_not_looked_at():
    found = bounds((*EMBEDDING, [-1, -2]), n_ext=2)
    assert not found.hold([TABLE, torch.zeros(MAX_ELEMENTS + 1, dtype=torch.int64)], [], [])
    found = bounds(("aten::index.Tensor", [["t"], ["ol", [1]]], [-1, -2]), n_ext=2)
    assert not found.hold([TABLE, torch.ones(8, dtype=torch.bool)], [], [])
