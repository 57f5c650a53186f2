"""`genie.profile` writes what happened, where, on one clock; and nothing is lost when things go wrong."""

from __future__ import annotations

import gzip
import json
import os
import threading
from pathlib import Path

import pytest
import torch

import genie
from genie import profiling
from genie.errors import ConfigError, GenieError, RemoteError, ServerLostError
from genie.frontend.session import Session
from genie.profiling import spans
from genie.runtime.link import ServerLink
from genie.runtime.remote import open_link
from genie.runtime.stateless import StatelessExecutor
from tests.frontend import models
from tests.frontend.conftest import TOKEN
from tests.profiling.traces import Trace

TOKENS = 4


def generate(model: torch.nn.Module) -> list[int]:
    prompt = torch.arange(3, 11).reshape(1, 8).to("genie")
    options = {"min_new_tokens": TOKENS, "max_new_tokens": TOKENS, "do_sample": False, "pad_token_id": 0}
    return model.generate(prompt, attention_mask=torch.ones_like(prompt), **options).cpu().tolist()[0]


def link_of(session: Session) -> ServerLink:
    (link,) = session.executor.links
    return link


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "ops"])
def decode(request, servers, tmp_path_factory) -> tuple[Trace, ServerLink]:
    """One warm generate() on a server, and the link that it went over."""
    path = tmp_path_factory.mktemp("trace") / "decode.json"
    with genie.connect(servers[0].address, TOKEN) as session:
        model = models.gpt2().to("genie")
        expected = generate(model)
        link = link_of(session)
        with genie.profile(path, ops=request.param):
            link.begin("decode-1")
            assert generate(model) == expected
        assert link.trace is None and spans.active is None
    return Trace(path), link


def test_replayed_calls_have_spans_and_run_on_the_server(servers, tmp_path) -> None:
    path = tmp_path / "replay.json"
    layers = [torch.nn.Linear(8, 8) for _ in range(20)]
    x = torch.ones(2, 8)
    with genie.connect(servers[0].address, TOKEN, replay=True) as session, torch.no_grad():
        model = torch.nn.Sequential(*layers).to("genie")
        for _ in range(2):
            model(x.to("genie"))
        with genie.profile(path):
            for _ in range(3):
                model(x.to("genie"))
            session.synchronize()
        assert session.recorder.replays == 4
    trace = Trace(path)
    replays = trace.named("replay")
    assert [s.args["ops"] for s in replays] == [20] * 3
    (server,) = trace.server_tracks()
    assert sum(s.args["ops"] >= 20 for s in trace.named("program", server)) == 3
    sends = trace.named("send")
    for span in replays:
        assert any(span.start <= s.start and s.end <= span.end for s in sends)


def test_every_program_is_captured_sent_and_run_as_its_receipt_says(decode) -> None:
    trace, link = decode
    (server,) = trace.server_tracks()
    receipts = link.usage.receipts
    programs = {s.args["program"]: s for s in trace.named("program", server)}
    sends = {s.args["program"]: s for s in trace.named("send")}
    captures = {s.args["program"]: s for s in trace.named("capture")}
    assert sorted(programs) == sorted(sends) == list(range(1, len(receipts) + 1))
    assert [programs[n].args["ops"] for n in sorted(programs)] == [r.ops for r in receipts]
    assert captures.keys() == {n for n, p in programs.items() if p.args["ops"]}
    assert {n: c.args["ops"] for n, c in captures.items()} == {n: programs[n].args["ops"] for n in captures}
    assert {s.args["program"] for s in trace.named("execute", server)} == captures.keys()
    for n, capture in captures.items():
        assert capture.end <= sends[n].start
        assert capture.args["template"] == programs[n].args["template"]
    assert {p.args["nonce"] for p in programs.values()} == {"decode-1"}
    total = sum(s.end - s.start for s in trace.named("execute", server)) / 1e6
    # Both ends of a span are told to within the clock's error: so is what lies between them, twice.
    error_ms = trace.other["servers"][0]["clock_error_ns"] / 1e6
    assert abs(total - link.timings.remote * 1e3) <= 2 * error_ms


def test_a_program_runs_between_its_send_and_the_reply_that_tells_of_it(decode) -> None:
    trace, _ = decode
    error = trace.other["servers"][0]["clock_error_ns"]
    sends = {s.args["program"]: s for s in trace.named("send")}
    waits = {n: s for s in trace.slices if s.name.startswith("wait") for n in s.args["programs"]}
    runs = trace.named("execute", trace.server_tracks()[0])
    assert runs
    for run in runs:
        n = run.args["program"]
        assert sends[n].start - error <= run.start
        assert run.end <= waits[n].end + error


def test_spans_nest_and_arrows_go_from_send_to_execution_to_fetch(decode) -> None:
    trace, link = decode
    trace.check()
    arrows = trace.arrows()
    assert len(arrows) == len(link.usage.receipts)
    for start, middle, *_ in arrows.values():
        assert trace.at(start)[-1].args["program"] == trace.at(middle)[0].args["program"]
    assert os.getpid() in trace.processes and link.connection.welcome.pid in trace.processes


def test_a_decode_syncs_once_per_token_by_item_and_once_by_cpu(decode) -> None:
    trace, _ = decode
    assert len(trace.named("wait (item)")) == len(trace.named("item")) == TOKENS
    assert len(trace.named("wait (cpu)")) == len(trace.named("cpu")) == 1
    for sync in trace.named("item"):
        assert any(sync.start <= w.start and w.end <= sync.end for w in trace.named("wait (item)"))


def test_a_capture_names_the_line_of_its_first_op(decode) -> None:
    trace, _ = decode
    assert all(":" in s.args["first_op"] for s in trace.named("capture"))
    lines = {s.args["first_op"] for s in trace.named("capture")}
    assert any("generation" in line for line in lines), lines


def test_ops_are_timed_when_asked_for_and_lie_within_their_program(decode, request) -> None:
    trace, link = decode
    timed = [s for s in trace.slices if "instruction" in s.args]
    if "plain" in request.node.name:
        assert not timed and not trace.other["ops_timed"]
        return
    assert len(timed) == sum(r.ops for r in link.usage.receipts)
    assert {"aten::addmm.default", "aten::scaled_dot_product_attention.default"} <= {s.name for s in timed}
    runs = trace.named("execute")
    assert all(any(r.start <= s.start and s.end <= r.end for r in runs) for s in timed)
    assert trace.other["ops_timed"] and not trace.other["device_synchronized_after_each_op"]


def test_two_processes_of_one_host_are_found_to_share_a_clock(decode) -> None:
    (server,) = decode[0].other["servers"]
    assert len(server["clock_offset_ns"]) == 2 and server["drift_corrected"]
    assert 0 < server["clock_error_ns"] < 5_000_000
    assert all(abs(offset) <= server["clock_error_ns"] for offset in server["clock_offset_ns"])


def test_several_sessions_and_servers_opened_before_and_within_the_block(servers, tmp_path) -> None:
    path = tmp_path / "trace.json"
    with genie.connect(servers[0].address, TOKEN):
        x = torch.ones(4).to("genie")
        with genie.profile(path):
            assert (x + 1).sum().item() == 8
            links = [open_link(s.address, TOKEN) for s in servers]
            with Session(StatelessExecutor(links, round_robin=True)):
                y = torch.randn(300, 300).to("genie")
                (y @ y).cpu()
                (y + y).cpu()
            with genie.local():
                assert (torch.ones(3).to("genie") * 2).sum().item() == 6
    trace = Trace(path)
    trace.check()
    assert len(trace.other["servers"]) == 3 and all(s["lost"] is None for s in trace.other["servers"])
    assert {s.track for s in trace.named("execute")} >= set(trace.server_tracks())
    assert len({pid for pid, _ in trace.server_tracks()}) == 2 and len(trace.server_tracks()) == 3
    (local,) = trace.named("execute", trace.client_track("in-process"))
    (captured,) = trace.named("capture", trace.client_track("session 3: capture"))
    assert captured.end <= local.start and captured.args["ops"] == local.args["ops"]


def test_an_upload_is_shown_with_its_size(servers, tmp_path) -> None:
    path = tmp_path / "trace.json"
    with genie.connect(servers[0].address, TOKEN), genie.profile(path):
        torch.nn.Linear(256, 256).to("genie")
    assert {s.args["tensor_bytes"] for s in Trace(path).named("upload")} == {256 * 256 * 4, 256 * 4}


def test_a_local_session_shows_capture_execution_and_ops(tmp_path) -> None:
    path = tmp_path / "trace.json.gz"
    with genie.local(), genie.profile(path, ops=True):
        x = torch.arange(6.0).to("genie")
        for _ in range(2):
            assert (x * 2).sum().item() == 30
    trace = Trace(path)
    trace.check()
    track = trace.client_track("in-process")
    ops = [s.name for s in trace.slices if s.track == track and "instruction" in s.args]
    assert ops == ["aten::mul.Scalar", "aten::sum.default"] * 2
    assert len(trace.named("compile", track)) >= 1 and not trace.other["servers"]
    json.loads(gzip.decompress(path.read_bytes()))


def test_own_spans_are_shown_on_the_threads_track(tmp_path) -> None:
    path = tmp_path / "trace.json"
    with genie.local(), genie.profile(path), profiling.span("replay", graph=7):
        torch.ones(2).to("genie").mul(torch.ones(2).to("genie")).cpu()
    (mine,) = Trace(path).named("replay")
    assert mine.args == {"graph": 7} and mine.end > mine.start


def test_a_span_costs_nothing_to_speak_of_without_a_profile() -> None:
    assert profiling.span("replay", graph=7) is profiling.span("other")


def test_a_profile_inside_another_is_refused_and_the_outer_one_goes_on(tmp_path) -> None:
    path = tmp_path / "outer.json"
    with genie.local(), genie.profile(path):
        with pytest.raises(GenieError, match="being taken already"), genie.profile(tmp_path / "inner.json"):
            raise AssertionError("the block of the inner profile ran")
        errors: list[BaseException] = []

        def other() -> None:
            try:
                with genie.profile(tmp_path / "thread.json"):
                    pass
            except GenieError as exc:
                errors.append(exc)

        thread = threading.Thread(target=other)
        thread.start()
        thread.join(10)
        assert len(errors) == 1
        torch.ones(2).to("genie").cumsum(0).cpu()
    assert Trace(path).named("capture") or Trace(path).slices
    assert [p.name for p in tmp_path.iterdir()] == ["outer.json"]


def test_an_exception_in_the_block_still_writes_the_trace(servers, tmp_path) -> None:
    path = tmp_path / "trace.json"
    with genie.connect(servers[0].address, TOKEN):
        x = torch.randn(3).to("genie")
        with pytest.raises(ZeroDivisionError), genie.profile(path):
            x.exp().cpu()
            raise ZeroDivisionError
        with genie.profile(path):  # a later profile is not hindered
            x.exp().cpu()
    assert len(Trace(path).named("program")) == 1


def test_a_program_that_failed_is_shown_as_failed(servers, tmp_path) -> None:
    path = tmp_path / "trace.json"
    with genie.connect(servers[0].address, TOKEN):
        table = torch.randn(4, 2).to("genie")
        with genie.profile(path):
            with pytest.raises(RemoteError):
                torch.nn.functional.embedding(torch.tensor([1, 99]).to("genie"), table).cpu()
            table.exp().cpu()
    trace = Trace(path)
    trace.check()
    failed = trace.named("failed program")
    assert len(failed) == 1 and len(trace.named("program")) == 1
    assert failed[0].args["program"] == 1 and trace.named("execute")[0].args["program"] == 2


@pytest.mark.parametrize("target", ["missing/trace.json", "."])
def test_an_unwritable_path_is_reported_before_the_block_runs(tmp_path: Path, target: str) -> None:
    with pytest.raises(ConfigError, match="cannot be written"), genie.profile(tmp_path / target):
        raise AssertionError("the block ran")
    with genie.profile(tmp_path / "good.json"):
        pass
    assert Trace(tmp_path / "good.json").slices == []


def test_a_limit_bounds_what_is_kept_and_the_trace_says_what_was_dropped(servers, tmp_path) -> None:
    path = tmp_path / "trace.json"
    with genie.connect(servers[0].address, TOKEN):
        x = torch.randn(3).to("genie")
        with genie.profile(path, limit=10):
            for _ in range(20):
                x.exp().cpu()
    trace = Trace(path)
    trace.check()
    # The client's half are programs, which keep their send and wait, and half the spans of cpu().
    assert len(trace.named("capture")) == len(trace.named("send")) == len(trace.named("wait (cpu)")) == 5
    assert len(trace.named("cpu")) == 5
    assert len(trace.named("program")) == 10 == trace.other["servers"][0]["dropped_requests"]
    assert trace.other["dropped"] == 30
    with pytest.raises(ConfigError, match="limit"), genie.profile(path, limit=0):
        raise AssertionError("the block ran")


def test_a_server_that_dies_in_the_block_leaves_the_clients_part(tmp_path) -> None:
    from genie.devices import device_slot
    from genie.runtime.server_process import start_servers

    path = tmp_path / "trace.json"
    (server,) = start_servers([device_slot("cpu", 0)], token=TOKEN, log_dir=tmp_path)
    with genie.connect(server.address, TOKEN):
        x = torch.randn(3).to("genie")
        with pytest.raises(ServerLostError), genie.profile(path):
            x.exp().cpu()
            server.close()
            x.sin().cpu()
    trace = Trace(path)
    trace.check()
    (entry,) = trace.other["servers"]
    assert "ended" in entry["lost"] and not entry["drift_corrected"]
    assert len(trace.named("capture")) == 2 and not trace.named("program")
