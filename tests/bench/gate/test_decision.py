"""The test behind a verdict: its level, its power, and the cases without any spread."""

import math

import numpy as np
import pytest
from scipy import stats

from genie.bench.gate.decision import (
    Estimate,
    Pair,
    Settings,
    holm,
    judge,
    log_ratio,
    paired_estimate,
    paired_estimates,
)
from genie.errors import CannotCompareError, ConfigError, ResultError
from tests.bench.gate.inputs import cell, cell_id, result

PAIRS = 10
CELLS = 20


def gate_runs(runs, true_ratio, noise, seed):
    """Judgements of ``runs`` gate runs of 20 cells; the first cell has ``true_ratio``, the others 1."""
    generator = np.random.default_rng(seed)
    for _ in range(runs):
        log_ratios = generator.normal(0, noise, (CELLS, PAIRS))
        log_ratios[0] += math.log(true_ratio)
        yield judge({str(n): paired_estimate(row.tolist()) for n, row in enumerate(log_ratios)}, Settings())


def test_holm_as_computed_by_hand():
    # Sorted: 0.005 x 4, 0.01 x 3, 0.03 x 2, 0.04 x 1; each at least the one before it.
    adjusted = holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005})
    assert adjusted == pytest.approx({"a": 0.03, "b": 0.06, "c": 0.06, "d": 0.02})
    assert holm({"a": 0.9, "b": 0.8}) == {"a": 1.0, "b": 1.0}
    assert holm({}) == {}


def test_p_and_bound_are_those_of_a_one_sample_t_test():
    log_ratios = np.random.default_rng(1).normal(0.08, 0.03, PAIRS).tolist()
    judged = judge({"cell": paired_estimate(log_ratios)}, Settings(floor=0.05, alpha=0.05))["cell"]
    expected = stats.ttest_1samp(log_ratios, 0.0, alternative="greater")
    assert judged.p_slower == pytest.approx(expected.pvalue)
    assert math.log(judged.lower) == pytest.approx(expected.confidence_interval(0.95).low)


def test_without_a_difference_almost_no_run_has_a_false_alarm():
    alarms = sum(any(one.slower for one in run.values()) for run in gate_runs(300, 1.0, 0.03, seed=2))
    assert alarms <= 3, "the floor of 5 % makes false alarms rarer than alpha"


def test_without_a_floor_the_familywise_level_holds():
    generator = np.random.default_rng(3)
    alarms = 0
    settings = Settings(floor=0.0, alpha=0.05)
    for _ in range(400):
        rows = generator.normal(0.0, 0.03, (CELLS, PAIRS))
        judged = judge({str(n): paired_estimate(row.tolist()) for n, row in enumerate(rows)}, settings)
        alarms += any(one.slower for one in judged.values())
    # 5 % of 400 is 20; three standard deviations above it are 33.
    assert alarms <= 33


def test_what_is_slower_by_less_than_the_floor_passes():
    """However sure it is: 2 % with a spread of 1 % is beyond doubt, and below what matters."""
    for run in gate_runs(100, 1.02, 0.01, seed=6):
        assert run["0"].p_slower < 0.1 or run["0"].ratio < 1.02
        assert not run["0"].slower


def test_ten_percent_is_seen_among_twenty_cells():
    seen = sum(run["0"].slower for run in gate_runs(200, 1.10, 0.02, seed=4))
    assert seen >= 180


def test_the_detectable_ratio_is_flagged_as_often_as_it_says():
    noise = 0.03
    level = {str(n): Estimate(0.0, noise / math.sqrt(PAIRS), PAIRS - 1, PAIRS) for n in range(CELLS)}
    detectable = judge(level, Settings())["0"].detectable
    seen = sum(run["0"].slower for run in gate_runs(300, detectable, noise, seed=5))
    # Bloom's approximation; the spread is estimated anew in each run.
    assert 0.85 <= seen / 300 <= 0.97


def test_faster_is_the_mirror_image():
    slow = [0.2, 0.21, 0.19, 0.2, 0.22]
    up = judge({"cell": paired_estimate(slow)}, Settings())["cell"]
    down = judge({"cell": paired_estimate([-x for x in slow])}, Settings())["cell"]
    assert (up.slower, up.faster, down.slower, down.faster) == (True, False, False, True)
    assert down.p_faster == pytest.approx(up.p_slower)
    assert down.upper == pytest.approx(1 / up.lower)


@pytest.mark.parametrize(("ratio", "slower"), [(1.0, False), (1.05, False), (1.06, True)])
def test_without_any_spread_the_ratio_itself_decides(ratio, slower):
    judged = judge({"cell": paired_estimate([math.log(ratio)] * 5)}, Settings())["cell"]
    assert (judged.slower, judged.faster) == (slower, False)
    assert judged.detectable is None


def test_one_wild_pair_does_not_flag_a_cell():
    judged = judge({"cell": paired_estimate([0.0] * 9 + [2.0])}, Settings())["cell"]
    assert judged.ratio > 1.2
    assert not judged.slower


def test_several_cases_count_by_their_median():
    old = result(cell(workload="ops", cases={"a": 1.0, "b": 1.0, "c": 1.0, "gone": 1.0})).cells
    new = result(cell(workload="ops", cases={"a": 1.1, "b": 9.0, "c": 1.0, "added": 1.0})).cells
    (was,), (now,) = old.values(), new.values()
    assert math.exp(log_ratio(was, now)) == pytest.approx(1.1)
    (other,) = result(cell(workload="ops", cases={"d": 1.0})).cells.values()
    with pytest.raises(CannotCompareError, match="no case in common"):
        log_ratio(was, other)


def test_two_pairs_are_not_enough():
    pair = Pair(result(cell()), result(cell()))
    with pytest.raises(ConfigError, match="--pairs 3 or more"):
        paired_estimates([pair, pair], [cell_id()])


def test_a_time_of_nothing_is_refused():
    good, bad = result(cell()), result(cell(seconds=0.0))
    with pytest.raises(ResultError, match="no measured time"):
        paired_estimates([Pair(good, bad)] * 3, [cell_id()])


@pytest.mark.parametrize("wrong", [{"alpha": 0.0}, {"alpha": 0.7}, {"floor": -0.01}, {"floor": math.nan}])
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(ConfigError, match="out of range"):
        Settings(**wrong)


def test_wild_samples_have_finite_bounds():
    judged = judge({"cell": Estimate(mean=0.0, error=1e4, df=1, samples=2)}, Settings())["cell"]
    assert math.isfinite(judged.upper)
    assert judged.lower > 0
    assert not judged.slower
