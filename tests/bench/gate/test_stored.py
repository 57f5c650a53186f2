"""Stored runs: ratios to local_pytorch of the same run, and what one run can and cannot tell."""

import math

import numpy as np
import pytest

from genie.bench.gate.decision import Settings, judge
from genie.bench.gate.stored import stored_estimates
from genie.errors import CannotCompareError, ResultError
from tests.bench.gate.inputs import cell, cell_id, result

FULL = cell_id("genie_full")


def pair(full, local=0.05, **more):
    return result(cell("local_pytorch", local), cell("genie_full", full, **more))


def estimate(old, new, of=FULL):
    return stored_estimates(old, new, [of])[of]


def test_the_drift_of_the_machine_cancels():
    same = estimate([pair(0.10, 0.05)], [pair(0.20, 0.10)])
    assert same.mean == pytest.approx(0.0)
    assert math.exp(estimate([pair(0.10)], [pair(0.13)]).mean) == pytest.approx(1.3)


def test_the_reference_itself_is_not_judged():
    ids = [cell_id("local_pytorch"), FULL]
    assert stored_estimates([pair(0.1)], [pair(0.1)], ids).keys() == {FULL}


def test_a_run_without_local_pytorch_is_refused():
    alone = result(cell("genie_full"))
    with pytest.raises(CannotCompareError, match=r"has no local_pytorch for decode.*--genie-baselines"):
        estimate([pair(0.1)], [alone])


def test_a_run_saved_without_rounds_is_refused():
    bare = result(cell("local_pytorch"), cell("genie_full") | {"stats": {"median": 0.1}})
    with pytest.raises(ResultError, match=r"--benchmark-json FILE, .*--benchmark-save-data"):
        estimate([pair(0.1)], [bare])


def test_one_round_is_refused():
    with pytest.raises(ResultError, match="--genie-rounds 3 or more"):
        estimate([pair(0.1)], [pair(0.1, rounds=(1.0,))])


def test_noisy_rounds_widen_the_bound():
    quiet = estimate([pair(0.1)], [pair(0.1)])
    noisy = estimate([pair(0.1)], [pair(0.1, rounds=(1.0, 1.5, 0.7, 1.0, 1.2))])
    assert noisy.error > 5 * quiet.error
    assert 4 <= noisy.df < 6, "almost all of its variance is that of five rounds"


def test_several_runs_show_the_spread_between_processes():
    steady = [pair(0.100), pair(0.1001), pair(0.0999)]
    wild = [pair(0.07), pair(0.10), pair(0.13)]
    assert estimate(steady, [pair(0.1)]).df == 2
    assert estimate(wild, [pair(0.1)]).error > 50 * estimate(steady, [pair(0.1)]).error


def test_the_microbenchmark_counts_by_the_median_of_its_cases():
    def run(factor, outlier):
        cases = {"a": 1.0, "b": 2.0, "c": 3.0}
        remote = {case: factor * seconds for case, seconds in cases.items()} | {"b": 2.0 * outlier}
        return result(
            cell("local_pytorch", workload="ops", cases=cases),
            cell("genie_full", workload="ops", cases=remote),
        )

    found = estimate([run(2.0, 2.0)], [run(2.4, 9.0)], cell_id(workload="ops"))
    assert math.exp(found.mean) == pytest.approx(1.2)


def test_a_link_is_a_ratio_to_the_raw_socket_beside_it():
    def link(seconds, raw):
        raw_s = [raw * factor for factor in (0.9, 1.0, 1.1)]
        return result(cell("genie_local_remote", seconds, workload="link", link={"raw_s": raw_s}))

    found = estimate([link(2e-4, 1e-4)], [link(3e-4, 1e-4)], cell_id("genie_local_remote", "link"))
    assert math.exp(found.mean) == pytest.approx(1.5)


@pytest.mark.parametrize(("between", "most"), [(0.0, 0.05), (0.03, None)])
def test_false_alarms_of_single_runs(between, most):
    """Within the level while processes do not differ; the documented weakness where they do."""
    generator = np.random.default_rng(6)

    def run():
        def noisy(baseline):
            factor = math.exp(generator.normal(0, between))
            return cell(baseline, 0.1 * factor, rounds=np.exp(generator.normal(0, 0.03, 5)).tolist())

        return result(noisy("local_pytorch"), noisy("genie_full"))

    settings = Settings(floor=0.0, alpha=0.05)
    alarms = sum(
        judge({FULL: estimate([run()], [run()])}, settings)[FULL].slower for _ in range(400)
    ) / 400  # fmt: skip
    if most is None:
        assert alarms > 0.05, "if this fails, the warning about single runs can go"
    else:
        assert alarms <= most + 3 * math.sqrt(0.05 * 0.95 / 400)


def test_a_client_cost_is_a_ratio_to_the_eager_pytorch_beside_it():
    def cost(seconds, eager):
        rounds = [eager * factor for factor in (1.01, 0.99, 1.0)]
        made = cell("genie_full", seconds, "client_cost", client_cost={"eager_rounds_s": rounds})
        return result(made)

    found = estimate([cost(2e-3, 4e-3)], [cost(6e-3, 8e-3)], cell_id(workload="client_cost"))
    assert math.exp(found.mean) == pytest.approx(1.5)
