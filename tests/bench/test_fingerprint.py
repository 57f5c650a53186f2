"""What a fingerprint holds, and how a difference between two of them is told."""

import platform
from copy import deepcopy
from pathlib import Path

import pytest
import torch

from genie.bench.fingerprint import cell_differences, differences, fingerprint
from genie.bench.options import read_options
from genie.bench.pool import RunningServers
from genie.bench.results import parse_result
from genie.bench.session import BenchSession
from genie.device_facts import device_facts
from genie.devices import device_slot
from genie.errors import AuthError
from genie.wire.messages import DeviceFacts

CPU = DeviceFacts("cpu", "A CPU", 1, "2")
GPU = DeviceFacts("cuda", "A GPU", 16, "2", host_cpu="A CPU", driver="580", max_sm_mhz=1980)


def session(pytester, *arguments):
    config = pytester.parseconfig("--genie-device", "cpu", *arguments)
    return BenchSession(read_options(config, {"GENIE_TOKEN": "right"}), parallel=False)


def test_the_client_is_this_host_with_its_libraries(pytester):
    client = session(pytester).fingerprint("local_pytorch", remote=False)["client"]
    assert client["python"] == platform.python_version()
    assert client["libraries"]["torch"].startswith(torch.__version__.partition("+")[0])
    assert client["cores"] >= 1
    assert "genie-bench" not in client["libraries"], "this project's version may differ"


def test_a_local_cell_has_one_device_and_a_remote_one_the_whole_pool(pytester):
    ours = session(pytester, "--genie-servers", "3")
    assert len(ours.fingerprint("local_pytorch", remote=False)["devices"]) == 1
    for baseline in ("genie_full", "ray"):
        devices = ours.fingerprint(baseline, remote=True)["devices"]
        assert [device["type"] for device in devices] == ["cpu"] * 3


def test_servers_at_addresses_tell_what_they_are(servers):
    pool = RunningServers([server.address for server in servers], "right")
    assert pool.facts(2) == [device_facts(device_slot("cpu", index)) for index in range(2)]


def test_servers_that_refuse_the_token_are_an_error(servers):
    with pytest.raises(AuthError):
        RunningServers([servers[0].address], "wrong").facts(1)


def test_equal_fingerprints_have_no_differences():
    assert differences(fingerprint([CPU, GPU]), fingerprint([CPU, GPU])) == []


def test_each_differing_fact_is_one_line():
    newer = DeviceFacts("cuda", "A GPU", 16, "2", host_cpu="A CPU", driver="590")
    assert differences(fingerprint([GPU]), fingerprint([newer])) == [
        "devices[0].driver: 580, not 590",
        "devices[0].max_sm_mhz: 1980, not nothing",
    ]


def test_another_number_of_devices_is_told_once():
    assert differences(fingerprint([CPU]), fingerprint([CPU, CPU])) == ["devices (count): 1, not 2"]


def test_hashes_are_shortened():
    assert differences({"sha256": "a" * 64}, {"sha256": "b" * 64}) == [
        "sha256: aaaaaaaaaaaa..., not bbbbbbbbbbbb..."
    ]


def cell(**more):
    info = {
        "schema_version": 2, "baseline": "genie_full", "workload": "tiny", "profile": "smoke", "params": {},
        "verified": {"ok": True}, "wire": {}, "weights": {"source": "seeded", "sha256": "0"},
        "model": {"name": "tiny"}, "fingerprint": fingerprint([CPU]), **more,
    }  # fmt: skip
    bench = {"name": "t", "fullname": "t", "group": "tiny", "extra_info": info, "stats": {"median": 1.0}}
    return parse_result({"benchmarks": [bench]}, Path("out.json")).cells["t"]


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"weights": {"source": "pretrained", "sha256": "0"}}, "weights.source: seeded, not pretrained"),
        ({"params": {"batch": 4}}, "params.batch: nothing, not 4"),
        ({"model": {"name": "smaller"}}, "model.name: tiny, not smaller"),
        ({"fingerprint": fingerprint([GPU])}, "fingerprint.devices[0].type: cpu, not cuda"),
        ({"ablated": ["residency"]}, "ablated: nothing, not ['residency']"),
    ],
)
def test_cells_of_other_work_or_devices_differ(changed, told):
    assert told in cell_differences(cell(), cell(**changed))
    assert cell_differences(cell(**changed), cell(**deepcopy(changed))) == []


def test_figures_do_not_make_cells_differ():
    assert cell_differences(cell(), cell(wire={"bytes_out": 1})) == []
