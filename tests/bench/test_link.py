"""The link benchmarks against a real server and a real raw peer."""

import json
import os
import signal
from contextlib import closing

import pytest

from genie.bench import link
from genie.bench.raw_socket import RawPeer
from genie.devices import available_cores
from tests.bench.test_runs import KEYS

LINKS = """
from genie.runtime.connection import Connection

def test_empty_round_trip(benchmark, genie_link):
    genie_link.empty_round_trip(benchmark)

def test_upload_64mib(benchmark, genie_link):
    genie_link.upload_64mib(benchmark)

def test_miscounted(benchmark, genie_link, monkeypatch):
    monkeypatch.setattr(Connection, "bytes_out", property(lambda self: self._channel.bytes_out + 1))
    genie_link.empty_round_trip(benchmark)
"""


def test_both_links_are_recorded_beside_a_raw_socket_and_a_wrong_counter_fails(pytester, monkeypatch):
    monkeypatch.setattr(link, "PING_ROUNDS", (40, 5))
    monkeypatch.setattr(link, "UPLOAD_ROUNDS", (2, 1))
    pytester.makepyfile(LINKS)
    result = pytester.runpytest_inprocess(
        "--benchmark-only", "--benchmark-json", "out.json",
        "--genie-profile", "smoke", "--genie-device", "cpu", "--genie-servers", "1",
    )  # fmt: skip
    result.assert_outcomes(passed=2, failed=1)
    result.stdout.fnmatch_lines(
        [
            "*WireCountError: empty round trip: client to server, the client counted*",
            "*link *genie *raw socket *ratio",
            "*empty round trip *ms *ms *x its time",
            "*upload 64 MiB *GB/s *GB/s *% of its throughput",
            "*miscounted *FAILED",
        ]
    )
    assert " cells: " not in result.stdout.str()
    data = json.loads((pytester.path / "out.json").read_text())
    ping, upload = (bench for bench in data["benchmarks"])
    for bench, rounds in ((ping, 40), (upload, 2)):
        info, figures = bench["extra_info"], bench["extra_info"]["link"]
        assert not KEYS - info.keys()
        assert (info["baseline"], info["workload"], info["verified"]["ok"]) == (
            "genie_local_remote", "link", True,
        )  # fmt: skip
        assert bench["group"] == f"link: {figures['case']}"
        assert info["rounds"] == len(figures["raw_s"]) == rounds
        assert bench["stats"]["median"] == pytest.approx(figures["median_s"], rel=1e-6)
        assert figures["time_ratio"] == pytest.approx(figures["median_s"] / figures["raw_median_s"])
    assert ping["extra_info"]["wire"]["bytes_out"] == ping["extra_info"]["link"]["raw_bytes_out"]
    assert (
        upload["extra_info"]["wire"]["bytes_out"] > upload["extra_info"]["link"]["raw_bytes_out"] == 64 << 20
    )


def test_the_links_go_with_their_baseline(pytester):
    pytester.makepyfile(LINKS)
    result = pytester.runpytest_inprocess("--collect-only", "--genie-baselines", "local_pytorch,ray")
    result.assert_outcomes(deselected=3)


def test_a_raw_peer_is_another_process_and_counts_what_it_got():
    with closing(RawPeer(1000, 3, available_cores()[:1])) as peer:
        assert peer.pid != os.getpid()
        for _ in range(5):
            peer.exchange(bytes(1000))
        assert (peer.bytes_out, peer.bytes_in) == peer.finish() == (5000, 15)


def test_a_raw_peer_that_dies_is_an_error_at_once():
    with closing(RawPeer(10, 1, available_cores())) as peer:
        os.kill(peer.pid, signal.SIGKILL)
        with pytest.raises(ConnectionError):
            for _ in range(100):
                peer.exchange(bytes(10))
