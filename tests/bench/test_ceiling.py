"""What several devices reach at best: real pinned processes, measured once per run that needs it."""

import json
import os

import pytest

from genie.bench.ceiling import ceiling_line, measure_ceiling
from genie.devices import DeviceSlot, available_cores, device_slot
from genie.errors import MeasurementError


def test_each_device_has_a_process_of_its_own_on_its_cores():
    slots = [device_slot("cpu", 0), device_slot("cpu", 1)]
    ceiling = measure_ceiling(slots, span_seconds=0.05)
    assert [one["cores"] for one in ceiling["processes"]] == [list(slot.cores) for slot in slots]
    assert len({os.getpid(), *(one["pid"] for one in ceiling["processes"])}) == 3
    assert ceiling["speedup"] == pytest.approx(ceiling["all_gflops"] / ceiling["one_gflops"])
    assert ceiling_line(ceiling).startswith(f"2 devices reach at most {ceiling['speedup']:.2f}x of one here")


def test_two_processes_on_one_core_are_no_faster_than_one():
    core = available_cores()[:1]
    ceiling = measure_ceiling([DeviceSlot("cpu", 0, core), DeviceSlot("cpu", 1, core)], span_seconds=0.1)
    # 1 on an idle core; two of four that share it get 1.5 times what one of three gets.
    assert ceiling["speedup"] < 1.7


def test_a_device_without_cores_is_an_error():
    with pytest.raises(MeasurementError, match="GEMM process of cpu:0"):
        measure_ceiling([DeviceSlot("cpu", 0, (4095,))])


def test_a_run_measures_it_when_a_timed_cell_used_several_devices(pytester, cells):
    arguments = cells(genie_full="OnTwoDevices")
    result = pytester.runpytest_inprocess(
        *arguments, "-k", "not batch4", "--benchmark-json", "out.json", "--genie-servers", "2",
        "--genie-baselines", "genie_full",
    )  # fmt: skip
    result.assert_outcomes(passed=1, deselected=1)
    result.stdout.fnmatch_lines(["2 devices reach at most *x of one here*"])
    assert json.loads((pytester.path / "out.json").read_text())["genie"]["ceiling"]["devices"] == 2


def test_a_run_can_leave_it_out(pytester, cells):
    arguments = cells(genie_full="OnTwoDevices")
    result = pytester.runpytest_inprocess(
        *arguments, "-k", "not batch4", "--benchmark-json", "out.json", "--genie-servers", "2",
        "--genie-baselines", "genie_full", "--genie-no-ceiling",
    )  # fmt: skip
    result.assert_outcomes(passed=1, deselected=1)
    assert "genie" not in json.loads((pytester.path / "out.json").read_text())
