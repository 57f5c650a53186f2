"""What a result tells of the GPUs: summed and reduced from readings, or None with a reason."""

from __future__ import annotations

import pytest
import torch

from genie.baselines.genie_remote import GenieLocalRemote
from genie.baselines.protocol import Metered, Metering, Reply, Setup
from genie.bench.record import CellRecord, Timed
from genie.device_facts import DeviceFacts
from genie.gpu_meter import GpuUse
from genie.runtime.remote import open_link
from genie.workloads.protocol import ModelInfo, Response


def recorded(*meterings):
    """The ``extra_info`` of a cell whose requests had these readings."""
    record = CellRecord("genie_full", "tiny", "smoke", {}, (), (0,), 0)
    record.setup = Setup({}, ModelInfo("tiny", 1, "float32", "seeded", "0"), 1)
    for number, metering in enumerate(meterings):
        reply = Reply(Response({}))
        record.timed.append(Timed(number, number, "", 0.1, 0.1, reply, 0, gpu=metering))
    return record.extra_info()


def use(uuid, energy_mj, peak, **more):
    return GpuUse(uuid, peak, 2 * peak, energy_mj, 0.1, utilization=90, sm_mhz=1980, **more)


def test_peaks_are_the_highest_and_energy_is_the_mean_by_gpu():
    first = Metering((use("GPU-a", 1000, 10, slowed_by=["power cap"]), use("GPU-b", 0, 5)))
    second = Metering((use("GPU-a", 3000, 30, slowed_by=[]), use("GPU-b", 0, 5)))
    info = recorded(first, second)
    a, b = info["gpu"]
    assert info["gpu_why"] is None
    assert (a["uuid"], a["peak_allocated"], a["peak_reserved"], a["energy_mj"]) == ("GPU-a", 30, 60, 2000)
    assert a["energy_s"] == pytest.approx(0.1)
    assert (a["utilization"], a["sm_mhz"], a["slowed_by"]) == (90, 1980, ["power cap"])
    assert (b["uuid"], b["energy_mj"], b["slowed_by"]) == ("GPU-b", 0, None)


def test_what_a_driver_refuses_is_none_and_told_once():
    refused = Metering((GpuUse("GPU-a", 10, 20, why="nvmlDeviceGetName: Not Supported"),))
    info = recorded(refused, refused)
    assert info["gpu"][0]["energy_mj"] is None
    assert info["gpu"][0]["peak_allocated"] == 10
    assert info["gpu_why"] == "nvmlDeviceGetName: Not Supported"


def test_without_a_gpu_there_is_none_and_a_reason():
    info = recorded(Metering(why="no GPU: the device is a CPU"))
    assert (info["gpu"], info["gpu_why"]) == (None, "no GPU: the device is a CPU")


def test_servers_are_asked_outside_of_the_bytes_of_a_request(servers):
    link = open_link(servers[0].address, "right")
    try:
        assert link.read_gpu(start=True).why == "no GPU: the device is a CPU"
        link.begin("a nonce")
        link.settle()
        traffic = link.traffic()
        assert link.read_gpu().use is None
        link.begin("another")
        link.settle()
        assert link.traffic() == traffic, "a question between two requests belongs to neither"
    finally:
        link.close()


def test_genies_remote_baselines_can_be_asked_and_servers_on_cpus_are_not(servers):
    baseline = GenieLocalRemote([servers[0].address], "right")
    assert isinstance(baseline, Metered)
    baseline.start_meters()
    assert baseline.read_meters() == Metering(why="no GPU: the servers run on CPUs")


def test_a_gpus_state_is_in_the_fingerprint_and_never_compared():
    from genie.bench.fingerprint import fingerprint

    from .test_fingerprint import cell, cell_differences

    stored = fingerprint([DeviceFacts("cpu", "A CPU", 1, "2")])
    assert (stored["gpus"], stored["gpus_why"]) == (None, "no GPU is used")
    hot = stored | {"gpus": [{"sm_mhz": 1980, "slowed_by": ["thermal (hardware)"]}], "gpus_why": None}
    assert cell_differences(cell(fingerprint=stored), cell(fingerprint=hot)) == []
    if not torch.cuda.is_available():
        assert fingerprint([DeviceFacts("cuda", "A GPU", 1, "2")])["gpus_why"], "no driver: a reason"
