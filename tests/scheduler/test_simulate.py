"""Predicted times against timelines worked out by hand (milliseconds in the comments)."""

from __future__ import annotations

import pytest

from genie.scheduler.cluster import Cluster, Device, Link
from genie.scheduler.nominal import NominalCost
from genie.scheduler.simulate import predict
from genie.scheduler.transfers import transfers
from genie.scheduler.where import Where
from tests.scheduler.graphs import Making, placed, pool, rows_split


def time_ms(problem, placement) -> tuple[float, tuple[float, ...]]:
    seconds, busy = predict(problem, placement, transfers(problem, placement))
    return seconds * 1e3, tuple(b * 1e3 for b in busy)


def test_one_server_waits_for_its_input_and_computes() -> None:
    m = Making()
    m.op(m.op(m.given(), us=2000), us=3000)
    # the input is there at 0.5 + 4, then 2 + 3
    assert time_ms(m.problem(), placed([0, 0])) == (pytest.approx(9.5), (5.0, 0.0))


def test_a_server_computes_while_a_value_is_on_its_way() -> None:
    m = Making()
    x = m.op(us=4000)
    y = m.op(us=5000)
    m.op(x, y, us=1000)
    # server 0: x done at 4.5, at server 1 at 6.0; server 1: y done at 5.5, waits to 6.0, done at 7.0
    assert time_ms(m.problem(), placed([0, 1, 1])) == (pytest.approx(7.0), (4.0, 6.0))


def test_transfers_between_two_servers_follow_each_other() -> None:
    m = Making()
    a, b = m.op(us=1000), m.op(us=1000)
    m.op(a, b)
    # a leaves at 1.5, arrives at 3.0; b is done at 2.5, its transfer takes from 3.0 to 4.5
    assert time_ms(m.problem(), placed([0, 0, 1]))[0] == pytest.approx(4.5)


def test_a_pipeline_overlaps_its_elements() -> None:
    m = Making()
    for _ in range(4):
        m.op(m.op(us=4000), us=4000)
    # first stage done at 4.5, 8.5, 12.5, 16.5; the last arrives at 18.0 and takes 4
    assert time_ms(m.problem(), placed([0, 1] * 4))[0] == pytest.approx(22.0)


def test_overheads_are_paid_by_both_ends() -> None:
    m = Making()
    m.op(m.op(us=1000), us=1000)
    # 0: 0.5 + 0.1 + 1 | new segment 0.1, transfer 0.2, copy 1.0 -> 2.9; link 1.5 -> 4.4
    # 1: waits from 0.7 to 4.4, copy 1.0, transfer 0.2, and computes 1.0
    assert time_ms(m.problem(pool(free=False)), placed([0, 1]))[0] == pytest.approx(6.6)


def test_rows_cost_their_share_and_whole_values_all() -> None:
    m = Making()
    whole = m.op(us=1000)
    m.op(m.given(), whole, us=8000)
    problem = m.problem(pool(2.0, 1.0))
    split = rows_split(problem.graph, whole=(whole,), rows=(3, 1))
    # server 0: 0.5 of the whole, 8 * 3/4 / 2; server 1: 1 and 8 / 4; rows arrive at 0.5 + 3 and 0.5 + 1
    assert time_ms(problem, placed([(0, 1), (0, 1)], split)) == (pytest.approx(6.5), (3.5, 3.0))


def test_weights_that_move_once_are_not_counted() -> None:
    m = Making()
    m.op(m.weight(), us=1000)
    problem = m.problem(where={-1: Where((0,))})
    assert time_ms(problem, placed([1]))[0] == pytest.approx(1.5)


def test_without_a_cost_model_only_nominal_work_counts() -> None:
    m = Making()
    m.op(m.op(m.given(), us=10**9))
    link = Link(1.0, 1.0)
    devices = tuple(Device(k, "", NominalCost(), link) for k in range(2))
    problem = m.problem(Cluster(devices, link))
    work = NominalCost().seconds(problem.graph.nodes)
    assert predict(problem, placed([0, 1]), transfers(problem, placed([0, 1])))[0] == pytest.approx(sum(work))
