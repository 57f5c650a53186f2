"""Calibration of a real server's device, with few probes; the command over what it stored."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from genie.cli import main
from genie.cost import calibrate, measure, programs, store
from genie.cost.judge import judge
from genie.cost.sizing import MAX_CALLS
from genie.devices import device_slot
from genie.errors import ConfigError
from genie.runtime.remote import open_link
from genie.runtime.server_process import ServerProcess
from genie.workloads import make_workload

DEVICE = os.environ.get("GENIE_TEST_DEVICE", "cpu")
TOKEN = "a token for calibration"


@pytest.fixture(scope="module")
def servers(tmp_path_factory) -> Iterator[list[ServerProcess]]:
    logs = tmp_path_factory.mktemp("servers")
    slot = device_slot(DEVICE, 0)
    with (
        ServerProcess.start(slot, token=TOKEN, log_dir=logs) as first,
        ServerProcess.start(slot, token=TOKEN, log_dir=logs) as second,
    ):
        yield [first, second]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("GENIE_CACHE_DIR", str(tmp_path))


@pytest.fixture
def few(monkeypatch) -> list[programs.Probe]:
    """Enough for a model: real ops at sizes that take a moment."""
    chosen = [programs.linear(m, 256, n) for m in (1, 16, 128) for n in (64, 1024)]
    chosen += [programs.binary("add", torch.add, 4**k) for k in (4, 6, 8, 10)]
    chosen += programs.microbenchmark_probes(make_workload("microbenchmark", "smoke").op_cases)
    monkeypatch.setattr(calibrate, "default_probes", lambda device_type: chosen)
    monkeypatch.setattr(calibrate, "DTYPES", {DEVICE: (torch.float32,)})
    return chosen


def addresses(servers) -> list[str]:
    return [s.address for s in servers]


def test_alike_servers_share_one_calibration(servers, few):
    seen: list[tuple[int, int]] = []
    models = calibrate.load_or_calibrate(
        addresses(servers), TOKEN, progress=lambda device, n, total: seen.append((n, total))
    )
    expected = len(few) * measure.ROUNDS
    assert seen == [(n, expected) for n in range(1, expected + 1)]  # one server was measured, once
    assert models[0].to_json() == models[1].to_json()
    held_out = models[0].measured["float32"]["held_out"]
    assert len(held_out["rows"]) == sum(p.held_out for p in few)
    assert all(row[2] > 0 and row[3] > 0 for row in held_out["rows"])

    seen.clear()
    again = calibrate.load_or_calibrate(addresses(servers), TOKEN, progress=lambda *a: seen.append(a[1:]))
    assert not seen
    assert again[0].to_json() == models[0].to_json()
    calibrate.load_or_calibrate(
        addresses(servers)[:1], TOKEN, force=True, progress=lambda *a: seen.append(a[1:])
    )
    assert len(seen) == expected


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Iterator[ServerProcess]:
    """A server that lets a session hold 1 MiB."""
    logs = tmp_path_factory.mktemp("small")
    extra = ["--memory-limit", str(1 << 20)]
    with ServerProcess.start(device_slot(DEVICE, 0), token=TOKEN, log_dir=logs, extra_args=extra) as server:
        yield server


def test_a_small_server_has_a_calibration_of_its_own(small, few, caplog):
    few.append(programs.linear(1, 1024, 1024))
    model = calibrate.load_or_calibrate([small.address], TOKEN)[0]
    assert sum("too little for a whole calibration" in r.message for r in caplog.records) == 1
    assert model.key["memory_limit"] == 1 << 20
    assert "linear 1x1024x1024" in model.measured["float32"]["left_out"]
    assert 0 < model.measured["float32"]["samples"] <= len(few) - len(model.measured["float32"]["left_out"])
    facts = {k: v for k, v in model.key.items() if k != "memory_limit"}
    assert store.load(facts) is None
    seen: list[int] = []
    calibrate.load_or_calibrate([small.address], TOKEN, progress=lambda *a: seen.append(1))
    assert not seen
    # A whole one is better, where there is one.
    store.save(replace(model, key=facts, device="whole"))
    again = calibrate.load_or_calibrate([small.address], TOKEN)[0]
    assert "memory_limit" not in again.key


def test_every_dtype_has_the_room_of_one(small):
    link = open_link(small.address, TOKEN)
    chosen = [programs.binary("add", torch.add, n) for n in (256, 16_384, 40_000)]
    dtypes = [torch.float32, torch.float64, torch.float32]
    samples = measure.measure(measure.remote(link), DEVICE, dtypes, chosen, rounds=1)
    assert {s.dtype for s in samples} == {"float32", "float64"}


def test_a_program_is_recorded_once_and_run_often(servers):
    """What is run again is the whole program: as long as the one that is recorded anew."""
    link = open_link(servers[0].address, TOKEN)
    executor = measure.remote(link)
    ran: list[int] = []
    execute = executor.executor.execute

    def counted(program, fetch, describe):
        ran.append(len(program.entries))
        return execute(program, fetch, describe)

    executor.executor.execute = counted
    measure.measure(executor, DEVICE, [torch.float32], [programs.binary("add", torch.add, 256)], rounds=3)
    # The one that is recorded, and two or three rounds; nothing else is as long.
    assert [n for n in ran if n > 8] in ([MAX_CALLS + 1] * 3, [MAX_CALLS + 1] * 4)


def test_what_is_measured_is_the_op_itself(servers):
    """Its nodes are those that a program of this op has, and larger work takes longer."""
    link = open_link(servers[0].address, TOKEN)
    chosen = [programs.linear(2, 512, 512), programs.linear(512, 512, 512), programs.turned(4, 64, 64)]
    samples = measure.measure(measure.remote(link), DEVICE, [torch.float32], chosen, rounds=2)
    assert [[n.name for n in s.computing] for s in samples[:2]] == [["linear"], ["linear"]]
    assert next(n.name for n in samples[2].nodes) == "transpose"
    assert samples[0].nodes[0].cost.flops == 2 * 2 * 512 * 512
    assert samples[1].seconds > (2 if DEVICE == "cpu" else 0) * samples[0].seconds


def test_this_process_can_be_measured_too():
    chosen = [programs.binary("add", torch.add, n) for n in (256, 65_536, 524_288)]
    samples = measure.measure(measure.in_process("cpu"), "cpu", [torch.float32], chosen, rounds=2)
    model = calibrate.fit("here", samples)
    assert judge(model, samples).mape < 50
    assert samples[0].seconds < samples[2].seconds


def test_measuring_needs_a_round():
    with pytest.raises(ValueError, match="rounds=0"):
        measure.measure(measure.in_process("cpu"), "cpu", [torch.float32], [], rounds=0)


def test_the_microbenchmark_is_measured_at_its_own_sizes():
    for profile in ("smoke", "cpu"):
        workload = make_workload("microbenchmark", profile)
        chosen = programs.microbenchmark_probes(workload.op_cases)
        assert [p.label for p in chosen] == list(workload.cases)
        assert [p.held_out for p in chosen] == [c.held_out for c in workload.op_cases]
        for probe in chosen:
            shapes = [tuple(t.shape) for t in workload.request(0, probe.label).inputs.values()]
            assert list(probe.inputs.values())[: len(shapes)] == shapes


def test_the_command_tells_the_ceilings_and_where_they_are(servers, few, capsys):
    assert main(["calibrate", "--address", ",".join(addresses(servers)), "--token-file", _token_file()]) == 0
    told = capsys.readouterr().out
    link = open_link(servers[0].address, TOKEN)
    with link.connection:
        assert str(store.path_of(store.key_of(link.connection.welcome.facts))) in told.replace("\n", "")
    for word in ("GFLOP/s", "matmul", "elementwise", "MAPE", "Spearman", "the same calibration"):
        assert word in told


def _token_file() -> str:
    path = os.path.join(os.environ["GENIE_CACHE_DIR"], "token")
    with open(path, "w") as file:
        file.write(TOKEN + "\n")
    os.chmod(path, 0o600)
    return path


def test_the_command_starts_a_server_of_its_own(few, capsys):
    before = os.sched_getaffinity(0)
    assert main(["calibrate", "--device", DEVICE]) == 0
    assert f"{DEVICE}:0" in capsys.readouterr().out
    assert os.sched_getaffinity(0) == before


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (["--address", ","], "--address"),
        (["--address", "127.0.0.1:1", "--token-file", "/nowhere"], "--token-file"),
        (["--address", "127.0.0.1:1"], "GENIE_TOKEN"),
    ],
)
def test_the_commands_errors_name_the_remedy(args, told, capsys, monkeypatch):
    monkeypatch.delenv("GENIE_TOKEN", raising=False)
    assert main(["calibrate", *args]) == 2
    assert told in capsys.readouterr().err


def test_a_cache_that_cannot_be_written_is_told(servers, few, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("GENIE_CACHE_DIR", str(tmp_path / "file"))
    with pytest.raises(ConfigError, match="GENIE_CACHE_DIR"):
        calibrate.load_or_calibrate(addresses(servers), TOKEN)
