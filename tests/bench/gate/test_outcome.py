"""From pairs of runs to verdicts and an exit status: two stages, and which finding is worst."""

import numpy as np
import pytest

from genie.bench.gate.against_mode import gate_against
from genie.bench.gate.decision import Pair, Settings
from genie.bench.gate.exit_codes import ExitCode
from genie.bench.gate.outcome import Outcome, Side, Verdict
from genie.errors import ConfigError
from tests.bench.gate.inputs import cell, cell_id, result

LOCAL, FULL = cell_id("local_pytorch"), cell_id("genie_full")
PAIRS = 6


class StoredPairs:
    """Hands out pairs made up beforehand; ``asked`` is what the gate wanted to have measured."""

    def __init__(self, first, again=()):
        self.stages = {"first": first, "again": again}
        self.asked = []

    def run(self, count, stage, cells=None):
        self.asked.append((stage, count, cells))
        return self.stages[stage][:count]


def pairs(*ratios, seed=0, new_cells=None, **new_more):
    """Pairs of two cells with 1 % of noise; ``ratios`` are new / old of genie_full, by pair in turn."""
    generator = np.random.default_rng(seed)

    def seconds(base):
        return base * float(np.exp(generator.normal(0, 0.01)))

    made = []
    for number in range(PAIRS):
        old = result(cell("local_pytorch", seconds(0.05)), cell("genie_full", seconds(0.1)))
        full = cell("genie_full", seconds(0.1) * ratios[number % len(ratios)], **new_more)
        new = new_cells or [cell("local_pytorch", seconds(0.05)), full]
        made.append(Pair(old, result(*new)))
    return made


def gate(first, again=(), **settings):
    runner = StoredPairs(first, again)
    outcome = gate_against(runner, PAIRS, Settings(**settings), Side("old"), Side("new"))
    return outcome, runner


def verdicts(outcome):
    return {found.id: found.verdict for found in outcome.cells}


def test_equal_sides_pass_without_a_second_stage():
    outcome, runner = gate(pairs(1.0))
    assert verdicts(outcome) == {LOCAL: Verdict.SAME, FULL: Verdict.SAME}
    assert outcome.exit_code == ExitCode.PASSED
    assert runner.asked == [("first", PAIRS, None)]


def test_a_flagged_cell_is_run_again_alone_and_fails_when_confirmed():
    outcome, runner = gate(pairs(1.2), pairs(1.2, seed=1))
    assert runner.asked[1] == ("again", PAIRS, [FULL])
    assert verdicts(outcome) == {LOCAL: Verdict.SAME, FULL: Verdict.SLOWER}
    assert outcome.exit_code == ExitCode.REGRESSION


def test_fresh_pairs_alone_decide():
    outcome, _ = gate(pairs(1.5), pairs(1.0, seed=1))
    assert verdicts(outcome)[FULL] == Verdict.NOT_CONFIRMED
    assert outcome.exit_code == ExitCode.PASSED


def test_a_flagged_cell_that_fails_in_a_fresh_pair_is_missing():
    again = pairs(1.2, seed=1)
    again[2] = Pair(again[2].old, result(cell("local_pytorch")))
    outcome, _ = gate(pairs(1.2), again)
    assert verdicts(outcome)[FULL] == Verdict.MISSING
    assert outcome.exit_code == ExitCode.MISSING_CELLS


def test_faster_is_told_and_passes():
    outcome, _ = gate(pairs(0.8))
    assert verdicts(outcome)[FULL] == Verdict.FASTER
    assert outcome.exit_code == ExitCode.PASSED


def test_a_slow_down_below_the_floor_passes():
    assert gate(pairs(1.2), floor=0.3)[0].exit_code == ExitCode.PASSED


def test_changed_counters_fail_until_they_are_accepted():
    changed = pairs(1.0, wire={"bytes_in": 900})
    assert gate(changed)[0].exit_code == ExitCode.COUNTERS_CHANGED
    accepted, _ = gate(changed, accept_counters=True)
    assert accepted.exit_code == ExitCode.PASSED
    assert "1 with changed counters (accepted)" in accepted.summary()


def test_a_new_cell_is_told_and_passes():
    cells = [cell("local_pytorch", 0.05), cell("genie_full"), cell("ray")]
    outcome, _ = gate(pairs(1.0, new_cells=cells))
    assert verdicts(outcome)[cell_id("ray")] == Verdict.NEW
    assert outcome.exit_code == ExitCode.PASSED


def test_missing_is_worse_than_slower_and_slower_than_counters():
    cells = [cell("local_pytorch", 0.09, wire={"bytes_out": 5})]
    outcome, _ = gate(pairs(1.0, new_cells=cells), pairs(1.0, new_cells=cells, seed=1))
    assert outcome.findings == {
        ExitCode.MISSING_CELLS, ExitCode.REGRESSION, ExitCode.COUNTERS_CHANGED
    }  # fmt: skip
    assert outcome.exit_code == ExitCode.MISSING_CELLS
    slower, _ = gate(pairs(1.2, wire={"bytes_out": 5}), pairs(1.2, seed=1))
    assert slower.exit_code == ExitCode.REGRESSION


def test_what_cannot_be_compared_is_worst():
    assert Outcome("against", Settings(), error="another machine").exit_code == ExitCode.CANNOT_COMPARE


def test_an_old_side_that_mostly_failed_cannot_judge_a_cell():
    few = pairs(1.0)
    few = [*few[:2], *(Pair(result(cell("local_pytorch")), pair.new) for pair in few[2:])]
    outcome, _ = gate(few)
    assert verdicts(outcome)[FULL] == Verdict.TOO_FEW
    assert outcome.exit_code == ExitCode.PASSED


def test_two_pairs_are_refused_before_anything_runs():
    runner = StoredPairs(pairs(1.0))
    with pytest.raises(ConfigError, match="--pairs 3 or more"):
        gate_against(runner, 2, Settings(), Side("old"), Side("new"))
    assert runner.asked == []
