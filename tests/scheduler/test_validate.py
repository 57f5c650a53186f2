"""What cannot be carried out is refused, with the instruction and the remedy."""

from __future__ import annotations

from dataclasses import replace

import pytest

from genie.errors import PlanError
from genie.scheduler.plan import BatchSplit
from genie.scheduler.transfers import transfers
from genie.scheduler.validate import shortage, unreachable, validate
from genie.scheduler.where import Axis, Shard, Where
from tests.scheduler.graphs import BYTES, Making, placed, pool, rows_split


def chain(count: int = 3) -> Making:
    m = Making()
    x = m.given()
    for _ in range(count):
        x = m.op(x)
    return m


def refused(problem, placement, *words: str) -> None:
    with pytest.raises(PlanError) as caught:
        validate(problem, placement)
    for word in ("policy mine", *words):
        assert word in str(caught.value)


def test_every_instruction_is_on_servers_that_there_are() -> None:
    problem = chain().problem()
    refused(problem, placed([0, 0]), "placed 2 instructions of 3")
    refused(problem, placed([0, 2, 0]), "instruction 1 (aten::linear.default)", "[0, 1]")
    refused(problem, placed([0, (), 0]), "instruction 1")
    refused(problem, placed([0, (1, 0), 0]), "ascending")
    validate(problem, placed([0, 1, 0]))


def test_only_cheap_instructions_run_as_copies() -> None:
    m = chain(1)
    m.op(0, name="aten::add.Tensor")
    refused(m.problem(), placed([(0, 1), 0]), "instruction 0", "copies")
    validate(m.problem(), placed([0, (0, 1)]))


def test_random_ops_are_at_home() -> None:
    m = chain(1)
    m.op(0, name="aten::bernoulli.default", args=[["t"]])
    m.op(name="genie::manual_seed", args=[["i"]])
    refused(m.problem(), placed([0, 1, 0]), "instruction 1 (aten::bernoulli.default)", "server 0")
    refused(m.problem(), placed([0, 0, 1]), "genie::manual_seed")
    validate(m.problem(), placed([1, 0, 0]))


@pytest.mark.parametrize(("dropout", "random"), [(0.0, False), (0.1, True)])
def test_attention_is_random_only_with_dropout(dropout, random) -> None:
    m = Making()
    args = [["t"], ["t"], ["t"], ["n"], ["f"], ["b", False]]
    name = "aten::scaled_dot_product_attention.default"
    m.op(m.given(), -1, -1, name=name, args=args, floats=(dropout,))
    assert bool(m.problem().flow.random) is random


def test_memory_that_is_written_to_is_on_one_server_until_the_last_write() -> None:
    m = chain(1)
    v = m.view(0)
    m.add(v)
    m.op(0)
    problem = m.problem()
    refused(problem, placed([0, 0, 1, 0]), "instruction 2 (aten::relu_.default)", "instruction 0")
    refused(problem, placed([0, 1, 1, 0]), "instruction 1 (aten::view.default)")
    validate(problem, placed([0, 0, 0, 1]))


def test_running_statistics_count_as_written_though_the_schema_hides_it() -> None:
    m = Making()
    x, mean, var = m.given(), m.given(), m.given()
    flags = [["t"], ["n"], ["n"], ["t"], ["t"], ["b", True], ["f"], ["f"], ["b", True]]
    m.op(x, mean, var, name="aten::batch_norm.default", args=flags, floats=(0.1, 1e-5))
    problem = m.problem(where={mean: Where((1,)), var: Where((1,))})
    refused(problem, placed([0]), "writes to e1")
    validate(problem, placed([1]))
    m.nodes[0].args[5] = ["b", False]
    validate(m.problem(where={mean: Where((1,)), var: Where((1,))}), placed([0]))


def test_state_is_written_where_it_is_unless_it_may_move() -> None:
    m = Making()
    m.add(m.given())
    there = {-1: Where((1,))}
    refused(m.problem(where=there), placed([0]), "instruction 0", "e0", "(1,)")
    validate(m.problem(where=there), placed([1]))
    validate(m.problem(where=there, movable={-1}), placed([0]))
    validate(m.problem(), placed([0]))


def test_externals_that_share_memory_are_written_and_read_in_one_place() -> None:
    m = Making()
    a, b = m.given(), m.given()
    m.add(a)
    m.op(b)
    problem = m.problem(alias={a: 7, b: 7})
    refused(problem, placed([0, 1]), "instruction 1", "reads e1")
    validate(problem, placed([1, 1]))
    validate(m.problem(), placed([0, 1]))


def test_a_view_that_outlives_the_window_stays_with_its_base() -> None:
    m = chain(1)
    m.view(0, leaves=True)
    m.view(-1, leaves=True)
    refused(m.problem(), placed([0, 1, 0]), "instruction 1", "outlives")
    refused(m.problem(where={-1: Where((1,))}), placed([0, 0, 0]), "instruction 2", "e0")
    validate(m.problem(), placed([0, 0, 1]))


def test_a_split_covers_the_rows_in_order_each_on_another_server() -> None:
    problem = chain().problem()
    good = rows_split(problem.graph)
    validate(problem, placed([(0, 1)] * 3, good))
    for shards in (
        (Shard(0, 0, 2), Shard(1, 3, 4)),
        (Shard(0, 0, 2), Shard(1, 2, 3)),
        (Shard(0, 0, 2), Shard(0, 2, 4)),
        (Shard(0, 0, 4), Shard(1, 4, 4)),
    ):
        refused(problem, placed([(0, 1)] * 3, BatchSplit(good.batch, shards)), "split")
    problem.may_split_batch = False
    refused(problem, placed([(0, 1)] * 3, good), "may not be split")


def test_a_split_says_where_the_batch_is_and_values_have_it_there() -> None:
    problem = chain().problem()
    split = rows_split(problem.graph)
    split.batch.axes[1] = Axis(1)
    refused(problem, placed([(0, 1)] * 3, split), "dimension 1 of %1")


def test_rows_are_worked_on_where_they_are() -> None:
    problem = chain().problem(pool(1, 1, 1))
    split = rows_split(problem.graph)
    refused(problem, placed([(0, 1), (0, 2), 0], split), "instruction 1", "(0, 1)")
    # A result that does not depend on the rows is whole on each server: the proof knows (`new_ones`).
    validate(problem, placed([(0, 1)] * 3, rows_split(problem.graph, whole=(1,))))


def test_what_is_local_to_a_part_stays_there() -> None:
    problem = chain().problem()
    split = rows_split(problem.graph)
    local = BatchSplit(replace(split.batch, local=frozenset({1})), split.shards)
    refused(problem, placed([(0, 1), (0, 1), 0], local), "instruction 2", "reads %1")
    validate(problem, placed([(0, 1)] * 3, local))
    validate(problem, placed([(0, 1), 0, 0], local))


def test_shards_of_an_earlier_window_are_not_dealt_anew() -> None:
    m = chain(1)
    problem = m.problem(where={-1: Where((), Axis(0), (Shard(0, 0, 1), Shard(1, 1, 4)))})
    refused(problem, placed([(0, 1)], rows_split(problem.graph)), "instruction 0", "another way")
    validate(problem, placed([(0, 1)], rows_split(problem.graph, rows=(1, 3))))


def test_memory_counts_what_arrives_and_what_is_alive() -> None:
    m = Making()
    x = m.op(m.given(), m.weight())
    m.op(m.op(x))
    # arriving: input and weight; alive: at most two of the three values
    for limit, fits in ((4 * BYTES, True), (4 * BYTES - 1, False)):
        problem = m.problem(pool(1, 1, limits=(limit, 0)))
        placement = placed([0, 0, 0])
        text = shortage(problem, placement, transfers(problem, placement))
        assert (text is None) == fits
        assert fits or "server 0" in text


def test_servers_without_a_link_exchange_nothing() -> None:
    problem = chain().problem(pool(peer=False))
    placement = placed([0, 1, 1])
    assert "instruction 1 (aten::linear.default)" in unreachable(problem, transfers(problem, placement))
    assert unreachable(problem, transfers(problem, placed([1, 1, 1]))) is None
