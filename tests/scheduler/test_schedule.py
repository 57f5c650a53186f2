"""The choice among proposals, what is told of the others, and policies that misbehave."""

from __future__ import annotations

from dataclasses import replace

import pytest

from genie.errors import PlanError
from genie.scheduler.explain import explain
from genie.scheduler.nominal import NominalCost
from genie.scheduler.plan import Declined, Placement
from genie.scheduler.policies import BUILT_IN, Branches, Colocation
from genie.scheduler.schedule import MIN_GAIN, schedule
from tests.scheduler.graphs import Making, placed, pool, rows_split
from tests.scheduler.test_policies import stream, two_towers


class Proposes:
    name = "mine"

    def __init__(self, *proposals: object) -> None:
        self.proposals = proposals

    def propose(self, problem):
        return self.proposals


def test_the_least_time_is_chosen_and_the_rest_is_considered() -> None:
    m = Making()
    m.op(us=1000)
    slow, fast = (replace(placed([s]), label=str(s)) for s in (0, 1))
    plan = schedule(m.problem(pool(1, 2)), [Proposes(slow, Declined("mine", "no", "x")), Proposes(fast)])
    assert plan.placement is fast and plan.servers == (1,)
    assert plan.predicted_s == pytest.approx(1e-3)
    assert plan.busy_s == (0.0, pytest.approx(0.5e-3))
    assert [(d.label, d.predicted_s) for d in plan.considered] == [("x", None), ("0", pytest.approx(1.5e-3))]
    assert "1.50 ms against 1.00 ms" in plan.considered[1].why


@pytest.mark.parametrize(("second_us", "splits"), [(1500, False), (8000, True)])
def test_a_split_that_saves_too_little_is_declined_with_both_figures(second_us, splits) -> None:
    m = Making()
    a, b = m.op(us=40_000, branch=0), m.op(us=second_us, branch=1)
    m.op(a, b, us=1)
    plan = schedule(m.problem(), [Colocation(), Branches()])
    single = (40.501 + second_us / 1e3) * 1e-3
    assert (plan.placement.policy == "branches") == splits
    if splits:
        assert plan.predicted_s < (1 - MIN_GAIN) * single
    else:
        (other,) = plan.considered
        assert other.predicted_s > (1 - MIN_GAIN) * single
        assert f"{other.predicted_s * 1e3:.2f} ms against {single * 1e3:.2f} ms" in other.why


def test_a_little_gain_is_not_enough() -> None:
    m = Making()
    a, b = m.op(us=40_000), m.op(us=2000)
    m.op(a, b, us=1)
    plan = schedule(m.problem(), [Proposes(placed([0, 0, 0]), placed([0, 1, 0]))])
    assert plan.servers == (0,)
    assert "saves less than 5%" in plan.considered[0].why


def test_a_policy_that_raises_is_named() -> None:
    class Raises:
        name = "broken"

        def propose(self, problem):
            raise KeyError("layer 3")

    with pytest.raises(PlanError, match=r"policy broken raised KeyError: 'layer 3'") as caught:
        schedule(stream().problem(), [Colocation(), Raises()])
    assert isinstance(caught.value.__cause__, KeyError)


def test_what_is_no_proposal_or_invalid_is_refused_with_its_policy() -> None:
    m = Making()
    m.op(us=1)
    with pytest.raises(PlanError, match="policy mine proposed 7"):
        schedule(m.problem(), [Proposes(7)])
    with pytest.raises(
        PlanError, match=r"policy mine: instruction 0 \(aten::linear.default\).*servers \[0, 1\]"
    ):
        schedule(m.problem(), [Proposes(placed([5]))])


def test_no_policy_that_fits_is_an_error_with_all_reasons() -> None:
    m = Making()
    m.op(m.weight((1000, 250)), us=1)
    with pytest.raises(PlanError, match=r"colocation \(server 0\): needs 1\.0 MB on server 0.*pipelining"):
        schedule(m.problem(pool(limits=(1000, 1000))), [policy() for policy in BUILT_IN.values()])
    with pytest.raises(PlanError, match="no policy was asked"):
        schedule(m.problem(), [])


def test_an_edge_between_servers_that_cannot_reach_each_other_is_named() -> None:
    m = Making()
    m.op(m.op(us=1), us=1)
    problem = m.problem(pool(peer=False))
    with pytest.raises(PlanError, match=r"mine: instruction 1 .* needs %0 from server 0"):
        schedule(problem, [Proposes(placed([0, 1]))])
    assert schedule(problem, [Proposes(placed([0, 1])), Colocation()]).servers == (0,)


def test_the_same_problem_gives_the_same_plan() -> None:
    plans = [schedule(stream().problem(pool(1, 2, 3)), [p() for p in BUILT_IN.values()]) for _ in range(2)]
    assert plans[0] == plans[1]


def test_without_a_cost_model_what_can_be_split_is_and_no_time_is_told() -> None:
    cluster = pool()
    cluster = replace(cluster, devices=tuple(replace(d, cost=NominalCost()) for d in cluster.devices))
    plan = schedule(stream(us=1).problem(cluster), [p() for p in BUILT_IN.values()])
    assert plan.placement.policy == "pipelining"
    assert plan.predicted_s is None and all(d.predicted_s is None for d in plan.considered)
    assert "ms" not in explain(stream(us=1).problem(cluster), plan)


def test_an_explanation_names_parts_servers_moves_and_alternatives() -> None:
    problem = two_towers(80_000, 60_000).problem()
    text = explain(problem, schedule(problem, [p() for p in BUILT_IN.values()]))
    for line in (
        "plan of 6 instructions over 2 servers: branches (2 towers), predicted 91.00 ms",
        "  server 0 (device0): 3 instructions, 80.00 ms of work",
        "  1-2: branch 0 on server 0, 80.00 ms",
        "  3-4: branch 1 on server 1, 60.00 ms",
        "  5-5: instructions on server 1, 1.00 ms",
        "    client -> server 0: 8 kB, copy e0 before 0, e1 before 1",
        "    server 0 -> server 1: 4 kB, copy %2 before 5",
        "    client -> server 1: 8 kB, copy e0 before 0, e3 before 3",
        "    client -> server 1: 4 kB, weights, once",
        "colocation (server 0), predicted",
        "prefill: no compute-bound phase was recognised",
    ):
        assert line in text, text


def test_an_explanation_of_a_split_shows_the_rows() -> None:
    m = Making()
    m.op(m.given(), us=1000)
    problem = m.problem()
    placement = Placement("mine", ((0, 1),), "because", rows_split(problem.graph, rows=(3, 1)))
    text = explain(problem, schedule(problem, [Proposes(placement)]))
    assert "batch of 4: rows 0:3 on server 0, 3:4 on server 1" in text
    assert "0-0: instructions on servers 0, 1, 0.75 ms" in text
