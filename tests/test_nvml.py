"""The adapter to the driver's library: what it refuses is None with a reason, never an exception.

The library is the one thing that stands in here: no test machine has a driver that fails on demand.
"""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from genie import nvml
from genie.gpu_meter import GpuMeter


class NVMLError(Exception):
    pass


def library(refused=(), **answers):
    """A `pynvml` whose functions named in ``refused`` raise, "all" for every one."""
    known = {
        "nvmlInit": None,
        "nvmlShutdown": None,
        "nvmlDeviceGetCount": 1,
        "nvmlDeviceGetHandleByIndex": "handle",
        "nvmlDeviceGetHandleByUUID": "handle",
        "nvmlDeviceGetName": b"A GPU",
        "nvmlDeviceGetUUID": "GPU-1234",
        "nvmlSystemGetDriverVersion": "580.1",
        "nvmlDeviceGetClockInfo": 1980,
        "nvmlDeviceGetMaxClockInfo": 2000,
        "nvmlDeviceGetEnforcedPowerLimit": 700_000,
        "nvmlDeviceGetCurrentClocksThrottleReasons": 0x1 | 0x4,
        "nvmlDeviceGetUtilizationRates": SimpleNamespace(gpu=97, memory=40),
        "nvmlDeviceGetTotalEnergyConsumption": 123_456,
    } | answers
    module = ModuleType("pynvml")
    module.NVMLError = NVMLError
    module.NVML_CLOCK_SM, module.NVML_CLOCK_MEM = 1, 2

    def function(name, answer):
        def call(*_):
            if name in refused or "all" in refused:
                raise NVMLError("Not Supported")
            return answer

        call.__name__ = name
        return call

    for name, answer in known.items():
        setattr(module, name, function(name, answer))
    return module


def given(monkeypatch, module):
    monkeypatch.setitem(sys.modules, "pynvml", module)


def test_a_gpu_tells_its_state(monkeypatch):
    given(monkeypatch, library())
    with nvml.loaded() as (driver, why):
        state = driver.state(driver.by_uuid("1234"))
    assert (why, state.why) == ("", "")
    assert (state.name, state.uuid, state.driver) == ("A GPU", "GPU-1234", "580.1")
    assert (state.sm_mhz, state.max_sm_mhz, state.memory_mhz, state.power_limit_w) == (1980, 2000, 1980, 700)
    assert (state.utilization, state.energy_mj) == (97, 123_456)
    assert state.slowed_by == ["power cap"], "being idle (bit 0) is no reason"


def test_what_one_question_is_refused_is_none_and_the_others_stay(monkeypatch):
    given(
        monkeypatch, library(refused=("nvmlDeviceGetTotalEnergyConsumption", "nvmlDeviceGetUtilizationRates"))
    )
    with nvml.loaded() as (driver, _):
        state = driver.state("handle")
    assert (state.energy_mj, state.utilization, state.sm_mhz) == (None, None, 1980)
    assert state.why == "nvmlDeviceGetUtilizationRates: Not Supported"


def test_a_driver_that_is_lost_answers_nothing(monkeypatch):
    lost = library()
    given(monkeypatch, lost)
    with nvml.loaded() as (driver, _):
        gone = library(refused=("all",))
        for name in vars(gone):
            if name.startswith("nvml"):
                monkeypatch.setattr(lost, name, getattr(gone, name))
        assert (driver.count(), driver.by_index(0), driver.by_uuid("1"), driver.version()) == (
            0,
            None,
            None,
            None,
        )
        state = driver.state("handle")
    assert [state.name, state.sm_mhz, state.slowed_by, state.energy_mj] == [None] * 4
    assert state.why


def test_no_driver_is_none_and_one_line_of_why(monkeypatch):
    given(monkeypatch, library(refused=("nvmlInit",)))
    assert nvml.load() == (None, "no NVML: Not Supported")


def test_no_library_is_none_and_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    driver, why = nvml.load()
    assert driver is None
    assert "pip install nvidia-ml-py" in why


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_a_meter_reads_nothing_and_says_so():
    meter = GpuMeter(torch.device("cpu"))
    meter.start()
    assert meter.read() is None
    assert meter.why == "no GPU: the device is a CPU"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_request_on_a_gpu_has_its_peak_and_never_a_negative_energy():
    meter = GpuMeter(torch.device("cuda", 0))
    meter.start()
    held = torch.ones(1 << 20, device="cuda", dtype=torch.uint8)
    use = meter.read()
    assert use.peak_allocated >= held.nbytes
    assert use.peak_reserved >= use.peak_allocated
    assert use.energy_mj is None or use.energy_mj >= 0
    assert (use.energy_mj is None) <= bool(use.why), "what is not known has a reason"
