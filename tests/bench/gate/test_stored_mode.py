"""``--stored`` from files to an outcome: with and without a second look, and with several baselines."""

import copy

import numpy as np
import pytest

from genie.bench.gate.decision import Settings
from genie.bench.gate.exit_codes import ExitCode
from genie.bench.gate.outcome import Verdict
from genie.bench.gate.stored_mode import AGAIN_RUNS, gate_stored
from genie.errors import CannotCompareError
from tests.bench.gate.inputs import FINGERPRINT, cell, cell_id, result, write

LOCAL, FULL = cell_id("local_pytorch"), cell_id("genie_full")


def stored(tmp_path, full, seed=0, name="run.json", **more):
    """A run whose genie_full takes ``full`` seconds, within 1 %."""
    noise = float(np.exp(np.random.default_rng(seed).normal(0, 0.005)))
    return write(
        tmp_path / name,
        cell("local_pytorch", 0.05),
        cell("genie_full", full * noise, **more),
        cell("ray", 0.3),
    )


def verdict(outcome, of=FULL):
    return next(found.verdict for found in outcome.cells if found.id == of)


class Fresh:
    """Runs to hand out in turn, in place of the suite; ``asked`` is which cells were wanted."""

    def __init__(self, *seconds):
        self.seconds = list(seconds)
        self.asked = []

    def __call__(self, like, out, cells):
        assert LOCAL in like.cells
        self.asked.append(cells)
        return result(cell("local_pytorch", 0.05), cell("genie_full", self.seconds.pop(0)), cell("ray", 0.3))


def test_a_given_run_that_is_slower_fails_at_once(tmp_path):
    old, new = stored(tmp_path, 0.1), stored(tmp_path, 0.13, seed=1, name="new.json")
    outcome = gate_stored([old], new, Settings(), tmp_path)
    assert (verdict(outcome), verdict(outcome, LOCAL)) == (Verdict.SLOWER, Verdict.REFERENCE)
    assert outcome.exit_code == ExitCode.REGRESSION
    (slower,) = outcome.with_verdict(Verdict.SLOWER)
    assert slower.detail == "not run again, because the results were given"
    assert "weaker than --against" in outcome.note


def test_a_flagged_cell_is_run_again_with_its_reference(tmp_path):
    fresh = Fresh(0.13, 0.131, 0.129, 0.13)
    outcome = gate_stored([stored(tmp_path, 0.1)], None, Settings(), tmp_path, fresh)
    assert fresh.asked == [None, *[[FULL, LOCAL]] * AGAIN_RUNS]
    assert verdict(outcome) == Verdict.SLOWER
    assert outcome.exit_code == ExitCode.REGRESSION


def test_fresh_runs_that_are_as_fast_as_before_clear_it(tmp_path):
    fresh = Fresh(0.13, 0.1, 0.101, 0.099)
    outcome = gate_stored([stored(tmp_path, 0.1)], None, Settings(), tmp_path, fresh)
    assert verdict(outcome) == Verdict.NOT_CONFIRMED
    assert outcome.exit_code == ExitCode.PASSED


def test_what_varies_between_stored_runs_does_not_fail(tmp_path):
    olds = [stored(tmp_path, full, name=f"{full}.json") for full in (0.08, 0.10, 0.12)]
    outcome = gate_stored(olds, stored(tmp_path, 0.125, name="new.json"), Settings(), tmp_path)
    assert outcome.exit_code == ExitCode.PASSED
    alone = gate_stored(olds[1:2], stored(tmp_path, 0.125, name="new.json"), Settings(), tmp_path)
    assert alone.exit_code == ExitCode.REGRESSION


def test_changed_counters_are_found_and_the_reference_must_be_there(tmp_path):
    old = stored(tmp_path, 0.1)
    new = stored(tmp_path, 0.1, name="new.json", wire={"bytes_out": 999})
    assert gate_stored([old], new, Settings(), tmp_path).exit_code == ExitCode.COUNTERS_CHANGED
    alone = write(tmp_path / "alone.json", cell("genie_full"))
    with pytest.raises(CannotCompareError, match="has no local_pytorch for decode"):
        gate_stored([alone], alone, Settings(), tmp_path)


def test_another_machine_is_refused(tmp_path):
    other = copy.deepcopy(FINGERPRINT)
    other["client"]["cpu_model"] = "another CPU"
    new = stored(tmp_path, 0.1, name="new.json", fingerprint=other)
    with pytest.raises(CannotCompareError, match="not another CPU"):
        gate_stored([stored(tmp_path, 0.1)], new, Settings(), tmp_path)
