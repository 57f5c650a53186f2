"""The gate's own error rates, from made-up processes of which the truth is known."""

import random

import pytest

from genie.bench.gate.decision import Settings
from genie.bench.gate.power import Step, power, rate
from genie.cli import main
from genie.errors import ConfigError
from tests.bench.gate.inputs import cell, cell_id, result

ROWS = ("genie_capture_only", "genie_full")


def steps(count, slower=1.0, noise=0.02, seed=0):
    """``slower`` is the factor of genie_full in B; ``noise`` the spread between processes."""
    draw = random.Random(seed)

    def process(factor=1.0):
        rows = [cell("genie_capture_only", 0.1 * draw.lognormvariate(0, noise))]
        rows.append(cell("genie_full", 0.1 * factor * draw.lognormvariate(0, noise)))
        return result(*rows)

    added = {cell_id("genie_full"): slower - 1}
    return [Step(process(), process(), process(slower), added) for _ in range(count)]


def test_a_real_slowdown_is_detected_and_equal_code_is_not_accused():
    found = power(steps(20, slower=1.15), 10, Settings(floor=0.05), runs=40)
    assert found.false_alarms.count == 0
    assert found.false_alarms.decisions == 40 * len(ROWS)
    assert found.detected.rate == found.detected_runs.rate == 1.0
    assert found.others.count == 0
    (slow,) = found.slow_cells
    assert slow.added == pytest.approx(0.15)
    assert slow.ratio == pytest.approx(1.15, abs=0.03)


def test_what_is_below_the_floor_is_not_detected():
    found = power(steps(20, slower=1.01), 10, Settings(floor=0.05), runs=20)
    assert found.detected.count == 0


def test_an_alarm_needs_the_confirmation_of_other_steps():
    """Half of the steps are slow in A' by chance: what a first stage may see, a confirmation does not."""
    recorded = steps(16, slower=1.2, noise=0.001)
    mixed = [Step(s.a, s.slow, s.slow, {}) for s in recorded[:8]] + recorded[8:]
    found = power(mixed, 3, Settings(floor=0.05), runs=200)
    assert found.flagged_first.count > 0
    assert found.false_alarms.count < found.flagged_first.count


def test_few_steps_confirm_with_those_that_are_left():
    found = power(steps(13), 10, Settings(), runs=1)
    assert (found.pairs, found.again, found.disjoint_runs) == (10, 3, 1)
    with pytest.raises(ConfigError, match="--steps 20"):
        power(steps(12), 10, Settings(), runs=1)


def test_bounds_are_exact():
    """No alarm in n decisions: the rate is below 1 - 0.05^(1/n) with 95 % confidence."""
    none = rate(0, 300)
    assert (none.rate, none.low) == (0.0, 0.0)
    assert none.high == pytest.approx(1 - 0.05 ** (1 / 300))
    assert rate(0, 0).high == 1.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--workload", "llm"], "choose one of"),
        (["--share", "0"], "percentage above 0"),
        (["--steps", "12"], "give --steps 20"),
        (["--from", ".", "--resume"], "nothing to resume"),
        (["--from", "absent"], "no complete step"),
        (["--runs", "0"], "1 or more"),
    ],
)
def test_bad_options_are_told_with_the_remedy(arguments, message, capsys):
    assert main(["gate-power", *arguments]) == 2
    assert message in capsys.readouterr().err
