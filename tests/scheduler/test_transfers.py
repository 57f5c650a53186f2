"""Which values move, from where, when: exactly."""

from __future__ import annotations

from genie.scheduler.plan import Transfer
from genie.scheduler.transfers import locations, transfers
from genie.scheduler.validate import validate
from genie.scheduler.where import Axis, Shard, Where
from tests.scheduler.graphs import BYTES, Making, placed, rows_split


def moved(problem, placement) -> list[Transfer]:
    validate(problem, placement)
    return list(transfers(problem, placement))


def test_a_value_moves_once_to_each_server_that_reads_it() -> None:
    m = Making()
    x = m.op(m.given())
    for _ in range(3):
        m.op(x)
    problem = m.problem()
    assert moved(problem, placed([0, 1, 1, 0])) == [
        Transfer(-1, -1, 0, BYTES, 0),
        Transfer(x, 0, 1, BYTES, 1, after=0),
    ]


def test_a_weight_that_is_elsewhere_moves_once_for_all_windows() -> None:
    m = Making()
    m.op(m.given(), m.weight())
    problem = m.problem(where={-2: Where((0,))})
    assert moved(problem, placed([1])) == [
        Transfer(-1, -1, 1, BYTES, 0),
        Transfer(-2, 0, 1, BYTES, 0, once=True),
    ]
    assert moved(problem, placed([0])) == [Transfer(-1, -1, 0, BYTES, 0)]


def test_what_was_written_to_moves_after_the_last_write() -> None:
    m = Making()
    x = m.op(m.given())
    m.add(m.view(x))
    m.op(x)
    problem = m.problem()
    assert moved(problem, placed([0, 0, 0, 1]))[1:] == [Transfer(x, 0, 1, BYTES, 3, after=2)]


def test_a_written_external_is_read_from_where_it_was_written() -> None:
    m = Making()
    m.add(m.given())
    m.op(-1)
    problem = m.problem()
    assert moved(problem, placed([1, 0])) == [
        Transfer(-1, -1, 1, BYTES, 0),
        Transfer(-1, 1, 0, BYTES, 1, after=0),
    ]
    assert locations(problem, placed([1, 0]))[-1] == Where((1,))


def test_a_split_takes_rows_from_the_client_and_gathers_for_one_server() -> None:
    m = Making()
    x = m.op(m.given(), m.weight())
    m.op(x)
    problem = m.problem()
    split = rows_split(problem.graph, rows=(3, 1))
    assert moved(problem, placed([(0, 1), 0], split)) == [
        Transfer(-1, -1, 0, 3000, 0, "scatter"),
        Transfer(-1, -1, 1, 1000, 0, "scatter"),
        Transfer(-2, -1, 0, BYTES, 0, once=True),
        Transfer(-2, -1, 1, BYTES, 0, once=True),
        Transfer(x, 1, 0, 1000, 1, "gather", after=0),
    ]
    assert locations(problem, placed([(0, 1), 0], split))[x] == Where((), Axis(0), split.shards)


def test_a_whole_value_on_a_server_is_scattered_from_there() -> None:
    m = Making()
    m.op(m.op(m.given()))
    problem = m.problem()
    split = rows_split(problem.graph)
    assert moved(problem, placed([0, (0, 1)], split))[1:] == [Transfer(0, 0, 1, 2000, 1, "scatter", after=0)]


def test_values_without_the_batch_are_copied_to_all_shards() -> None:
    m = Making()
    mask = m.op(m.given())
    m.op(m.given(), mask)
    problem = m.problem()
    split = rows_split(problem.graph, whole=(-1, mask))
    assert moved(problem, placed([(0, 1), (0, 1)], split))[:2] == [
        Transfer(-1, -1, 0, BYTES, 0),
        Transfer(-1, -1, 1, BYTES, 0),
    ]
    assert Transfer(mask, 0, 1, BYTES, 1, after=0) in moved(problem, placed([0, (0, 1)], split))


def test_shards_of_an_earlier_window_are_used_where_they_are_or_gathered() -> None:
    m = Making()
    m.op(m.given())
    graph = m.graph()
    shards = (Shard(0, 0, 2), Shard(1, 2, 4))
    problem = m.problem(where={-1: Where((), Axis(0), shards)})
    assert moved(problem, placed([(0, 1)], rows_split(graph))) == []
    assert moved(problem, placed([1])) == [Transfer(-1, 0, 1, 2000, 0, "gather")]
