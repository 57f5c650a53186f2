"""Engines that fail, in all ways they can: the run goes on eagerly, and the receipt says so."""

from __future__ import annotations

import copy
import logging

import pytest
import torch

from genie.server.engines import growing, select
from genie.server.engines.agree import disagreement
from genie.server.engines.graphs import CaptureError, repeated
from genie.server.engines.kv import State, as_tensor
from tests.server.engines.serving import counters, prompt, session
from tests.server.engines.toys import Decoder, generate

IDS = prompt(vocabulary=64)


@pytest.fixture(scope="module")
def model():
    return Decoder()


def check(serving, model, runs=2):
    """Generates with right results; the counters, and why which templates were refused."""
    with torch.no_grad():
        expected = generate(model, IDS)
    with session(serving, replay=False) as opened:
        remote = copy.deepcopy(model).to("genie")
        for _ in range(runs):
            torch.testing.assert_close(generate(remote, IDS.to("genie")), expected, rtol=1e-3, atol=1e-3)
        seen, refusals = counters(opened), serving.refusals()
    return seen, refusals


def raising(error):
    def capture(call):
        raise error

    return capture


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), "no memory left"),
        (CaptureError("operation not permitted when stream is capturing"), "not permitted when stream"),
        (RuntimeError("CUDA error: invalid argument"), "RuntimeError: CUDA error: invalid argument"),
        (KeyError("anything"), "KeyError: 'anything'"),
    ],
    ids=["memory", "capture", "cuda", "other"],
)
def test_a_program_that_cannot_be_captured_runs_eagerly(graphs, model, caplog, error, reason):
    graphs.use_pool(capture=raising(error))
    with caplog.at_level(logging.INFO, "genie.server"):
        seen, refusals = check(graphs, model, runs=1)
    assert seen["engine_failed"] == 1, "it is not tried again"
    assert not seen["engine_graph"] and not seen["rewritten"]
    assert len(refusals) == 1 and reason in refusals[0]
    assert any(reason in r.getMessage() for r in caplog.records)
    assert len(graphs.pool) == 0


def test_a_replay_that_fails_in_the_middle(graphs, model):
    replays = []

    def capture(call):
        replay, outputs, nbytes = repeated(call)

        def failing():
            replays.append(1)
            if len(replays) == 7:
                raise RuntimeError("the driver said no")
            replay()

        return failing, outputs, nbytes

    graphs.use_pool(capture=capture)
    seen, refusals = check(graphs, model, runs=1)
    assert len(replays) == 7 and seen["engine_graph"] == 6
    assert seen["engine_failed"] == 1
    assert "the driver said no" in refusals[0]


def wrong_values(values):
    """The first kept value that is no cache, off by a hundredth."""
    k = next(
        k
        for k, v in enumerate(values)
        if v is not None and not isinstance(v, State) and v.is_floating_point()
    )
    values[k] = values[k] * 1.01
    return values


def wrong_token(values):
    k = next(k for k, v in enumerate(values) if isinstance(v, torch.Tensor) and not v.is_floating_point())
    values[k] = values[k] + 1
    return values


def wrong_cache(values):
    state = next(v for v in values if isinstance(v, State))
    state.view().add_(0.01)
    return values


def missing(values):
    return values[:-1]


def nan(values):
    k = next(k for k, v in enumerate(values) if isinstance(v, torch.Tensor) and v.is_floating_point())
    values[k] = values[k].clone()
    values[k].view(-1)[0] = float("nan")
    return values


@pytest.mark.parametrize("wrong", [wrong_values, wrong_token, wrong_cache, missing, nan])
@pytest.mark.parametrize("engine", [growing.InPlace, growing.Captured], ids=["rewritten", "graph"])
def test_an_engine_that_computes_something_else_is_found_out(
    graphs, model, monkeypatch, caplog, engine, wrong
):
    if engine is growing.InPlace:
        graphs.use_no_pool()
    run, runs = engine.run, []

    def run_wrongly(self, call):
        runs.append(1)
        values = run(self, call)
        return wrong(values) if any(isinstance(v, State) for v in values) else values

    monkeypatch.setattr(engine, "run", run_wrongly)
    with caplog.at_level(logging.INFO, "genie.server"):
        seen, refusals = check(graphs, model, runs=1)
    assert len(runs) == 1 and seen["engine_failed"] == 1 and not seen["rewritten"]
    assert "kept value" in refusals[0] or "it keeps" in refusals[0]
    assert any("stays with the eager engine" in r.getMessage() for r in caplog.records)


def test_each_variant_is_checked_once(serving, model, monkeypatch):
    checked = []

    def counting(made, eager):
        checked.append(1)
        return disagreement(made, eager)

    monkeypatch.setattr(select, "disagreement", counting)
    seen, refusals = check(serving, model, runs=3)
    assert not seen["engine_failed"] and not refusals
    assert 1 <= len(checked) <= 3
    assert seen["rewritten"] >= 60


def test_an_engine_that_is_slower_is_given_up(graphs, model, monkeypatch):
    """By what `took` is told, in which nothing but its number counts."""
    monkeypatch.setattr(select, "SLOWER", 1.1)
    took = select.Engines.took

    def slow(self, seconds):
        running = self._last is not None and self._last.running is not None
        took(self, 2.0 if running else 1.0)

    monkeypatch.setattr(select.Engines, "took", slow)
    seen, refusals = check(graphs, model, runs=1)
    assert seen["engine_graph"] == select.TRIALS + 1
    assert not seen["engine_failed"], "it did not fail"
    assert any("took longer than the eager engine" in why for why in refusals)


def test_one_that_is_faster_stays(graphs, model, monkeypatch):
    monkeypatch.setattr(select, "SLOWER", 1.1)
    took = select.Engines.took

    def fast(self, seconds):
        running = self._last is not None and self._last.running is not None
        took(self, 0.5 if running else 1.0)

    monkeypatch.setattr(select.Engines, "took", fast)
    seen, refusals = check(graphs, model)
    assert seen["engine_graph"] > 2 * select.TRIALS and not refusals


# -- the comparison itself -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "error", "agree"),
    [
        (torch.float32, 5e-4, True), (torch.float32, 2e-3, False), (torch.float16, 1e-2, True),
        (torch.bfloat16, 1e-2, True), (torch.float16, 5e-2, False), (torch.float64, 1e-5, False),
    ],
)  # fmt: skip
def test_a_relative_error(dtype, error, agree):
    eager = torch.linspace(-3, 3, 256).to(dtype)
    why = disagreement([(eager.double() * (1 + error)).to(dtype)], [eager])
    assert (why == "") is agree, why


def test_infinities_and_nan_in_the_same_places_agree():
    eager = torch.tensor([1.0, float("inf"), -float("inf"), float("nan")])
    assert disagreement([eager.clone()], [eager]) == ""
    for k in range(4):
        other = eager.clone()
        other[k] = 2.0
        assert disagreement([other], [eager])
    assert disagreement([torch.tensor([float("inf")])], [torch.tensor([1.0])])


def test_shapes_dtypes_strides_and_absence_count():
    eager = torch.ones(2, 3)
    assert disagreement([torch.ones(3, 2)], [eager])
    assert disagreement([eager.double()], [eager])
    assert disagreement([torch.ones(3, 2).t()], [eager])
    assert disagreement([None], [eager])
    assert disagreement([], [eager])
    assert disagreement([eager.clone(), None], [eager, None]) == ""
    assert disagreement([torch.ones(2, dtype=torch.int64)], [torch.tensor([1, 2])])
    assert disagreement([as_tensor(torch.zeros(3))], [torch.zeros(3)]) == ""
