"""The pool of graphs that all sessions share: who may use what, and what it may hold."""

from __future__ import annotations

import copy
import time

import pytest
import torch

from genie.errors import OutOfMemoryError
from genie.server.engines import graphs as graphs_module
from genie.server.engines.graphs import MOST_ALIKE, CaptureError, GraphPool, Instance, repeated
from genie.server.engines.kv import Buffers, Growth, State, Step
from genie.server.engines.specialize import Spec
from tests.server.engines.serving import Serving, counters, prompt, session
from tests.server.engines.toys import Decoder, choose, decode, generate

IDS = prompt(vocabulary=64)
WAIT_SECONDS = 20.0


@pytest.fixture(scope="module")
def model():
    """Its weights are large enough for a server to share them between sessions."""
    return Decoder(width=256)


@pytest.fixture(scope="module")
def expected(model):
    with torch.no_grad():
        return generate(model, IDS)


def close(one, other):
    torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)


def instances(pool):
    return [i for alike in pool._instances.values() for i in alike]


def wait_until(true):
    deadline = time.monotonic() + WAIT_SECONDS
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def wait_until_free(pool):
    """No buffers of a session that ended stay in use."""
    wait_until(lambda: not any(i.busy for i in instances(pool)))


def flush():
    """Takes the releases of what is gone along."""
    (torch.ones(1).to("genie") + 1).cpu()


def decode_more(model):
    """The 25th step."""
    with torch.no_grad():
        return generate(model, IDS, 25)[:, -1:]


def test_two_sessions_at_once(graphs, model, expected):
    """A step of the one, a step of the other: both use the pool, each its own buffers."""
    with session(graphs, replay=False) as first:
        one = copy.deepcopy(model).to("genie")
        states = {0: choose(*one(IDS.to("genie")))}
        with session(graphs, replay=False) as second:
            other = copy.deepcopy(model).to("genie")
            states[1] = choose(*other(IDS.to("genie")))
            rows = {0: [], 1: []}
            for _ in range(24):
                for k, remote in enumerate((one, other)):
                    row, states[k] = decode(remote, *states[k], 1)
                    rows[k].append(row)
            seen = [counters(opened) for opened in (first, second)]
            assert sum(i.busy for i in instances(graphs.pool)) == 2
            states.pop(1)
        wait_until(lambda: sum(i.busy for i in instances(graphs.pool)) == 1)
        close(decode(one, *states[0], 1)[0], decode_more(model))
    for k in range(2):
        close(torch.cat(rows[k], dim=1), expected)
        assert seen[k]["engine_graph"] > 20 and not seen[k]["engine_failed"]
    wait_until_free(graphs.pool)


def test_the_next_session_uses_what_the_last_one_captured(graphs, model, expected):
    captures = []

    def capture(call):
        captures.append(1)
        return repeated(call)

    pool = graphs.use_pool(capture=capture)
    made = []
    for _ in range(2):
        with session(graphs, replay=False) as opened:
            remote = copy.deepcopy(model).to("genie")
            for _ in range(3):
                close(generate(remote, IDS.to("genie")), expected)
            assert counters(opened)["engine_graph"] > 50
            made.append(instances(pool))
        wait_until_free(pool)
    # Small parameters are uploaded anew, so what reads them where they are is captured anew.
    if len(captures) == len(made[0]):
        assert made[0] == made[1]
    assert len(pool) == len(captures)


def test_a_second_generation_finds_the_buffers_of_the_first(graphs, model, expected):
    with session(graphs, replay=False):
        remote = copy.deepcopy(model).to("genie")
        close(generate(remote, IDS.to("genie")), expected)
        first = instances(graphs.pool)
        assert len(first) == 1 and first[0].buffers is not None
        for _ in range(3):
            close(generate(remote, IDS.to("genie")), expected)
        growing = [i for i in instances(graphs.pool) if i.buffers is not None]
        assert growing == first


def test_no_buffer_is_busy_once_its_caches_are_gone(graphs, model):
    with session(graphs, replay=False) as opened:
        remote = copy.deepcopy(model).to("genie")
        _, state = decode(remote, *choose(*remote(IDS.to("genie"))), 10)
        counters(opened)
        assert [i.busy for i in instances(graphs.pool)] == [True]
        del state
        flush()
        counters(opened)
        assert [i.busy for i in instances(graphs.pool)] == [False]
        _, _state = decode(remote, *choose(*remote(IDS.to("genie"))), 10)
    wait_until_free(graphs.pool)


def test_states_count_as_held(graphs, model):
    """As much as the tensors that they stand for; the buffers behind them are the pool's."""
    held = []
    for engines in ((), ("graph",)):
        with session(graphs, replay=False, engines=engines) as opened:
            remote = copy.deepcopy(model).to("genie")
            _, (token, caches) = decode(remote, *choose(*remote(IDS.to("genie"))), 10)
            flush()
            held.append(opened.executor.link.counters().held_bytes)
            if engines:
                assert counters(opened)["engine_graph"]
                before = held[-1]
                caches[0].cpu()
                flush()
                assert opened.executor.link.counters().held_bytes == before
            del token, caches
    assert held[0] == held[1] > 0


def test_a_session_over_its_limit_is_told_so():
    model = Decoder()
    serving = Serving(memory_limit=1 << 20)
    serving.use_pool()
    try:
        with session(serving, replay=False):
            remote = copy.deepcopy(model).to("genie")
            states = []
            with pytest.raises(OutOfMemoryError, match="over its limit"):
                for seed in range(400):
                    states.append(
                        decode(remote, *choose(*remote(prompt(seed, vocabulary=64).to("genie"))), 12)
                    )
            assert len(states) > 3
    finally:
        serving.close()


# -- the pool by itself --------------------------------------------------------------------------------

SPEC = Spec((1, 2, 5, 8), (80, 40, 8, 1), torch.float32)
CACHE_BYTES = 2 * 64 * 8 * 4


def instance(capacity=64, capture=repeated):
    buffers = Buffers([Growth(0, 0, SPEC, SPEC)], capacity, torch.device("cpu"))
    return Instance(lambda args: [], [*buffers.tensors], [], buffers, [], None, capture)


def test_what_was_used_last_longest_ago_makes_room():
    pool = GraphPool(3 * CACHE_BYTES, repeated)
    made = {key: pool.add(key, instance) for key in "abc"}
    assert len(pool) == 3 and pool.nbytes == 3 * CACHE_BYTES
    made["a"].replay([])
    pool.add("d", instance)
    assert len(pool) == 3 and pool.nbytes <= pool.limit
    assert pool.find("b") is None
    assert pool.find("a") is made["a"]


def test_what_is_in_use_is_not_evicted():
    pool = GraphPool(2 * CACHE_BYTES, repeated)
    first = pool.add("a", instance)
    state = State(Step(first.buffers, 5), 0)
    pool.add("b", instance)
    pool.add("c", instance)
    assert first in instances(pool) and pool.find("a") is None and pool.find("b") is None
    state.take()
    assert not first.busy, "a state that became a tensor needs no buffer"
    assert pool.find("a") is first


def test_the_pool_never_holds_more_than_its_limit():
    pool = GraphPool(2 * CACHE_BYTES, repeated)
    with pytest.raises(CaptureError, match="over their limit"):
        pool.add("a", lambda: instance(capacity=256))
    assert len(pool) == 0
    made = [pool.add(k, instance) for k in range(2)]
    states = [State(Step(i.buffers, 3), 0) for i in made]
    with pytest.raises(CaptureError, match="over their limit"):
        pool.add(2, instance)
    assert instances(pool) == made and all(s.shape[2] == 3 for s in states)


def test_a_program_that_does_not_fit_into_the_pool_runs_eagerly(graphs, model, expected):
    pool = graphs.use_pool(limit=1000)
    with session(graphs, replay=False) as opened:
        remote = copy.deepcopy(model).to("genie")
        close(generate(remote, IDS.to("genie")), expected)
        seen = counters(opened)
    assert seen["engine_failed"] and not seen["engine_graph"]
    assert pool.nbytes <= pool.limit


def test_two_models_in_turns_under_a_small_limit(graphs):
    pool = graphs.use_pool(limit=400 << 10)
    models = [Decoder(seed=k) for k in range(3)]
    with torch.no_grad():
        wanted = [generate(m, IDS) for m in models]
    with session(graphs, replay=False) as opened:
        remote = [copy.deepcopy(m).to("genie") for m in models]
        for _ in range(4):
            for m, output in zip(remote, wanted, strict=True):
                close(generate(m, IDS.to("genie")), output)
                assert pool.nbytes <= pool.limit
        seen = counters(opened)
    assert seen["engine_graph"] > 100 and not seen["engine_failed"]


def test_memory_that_runs_out_is_taken_from_what_is_free():
    pool = GraphPool(1 << 30, repeated)
    busy, free = pool.add("a", instance), pool.add("b", instance)
    step = Step(busy.buffers, 1)
    calls = []

    def make():
        calls.append(1)
        if len(calls) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return instance()

    third = pool.add("c", make)
    assert set(instances(pool)) == {busy, third} and free not in instances(pool)
    assert step.buffers is busy.buffers

    def never():
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        pool.add("d", never)
    assert instances(pool) == [busy]


def test_more_generations_at_a_time_than_there_are_buffers_for(graphs, model, monkeypatch):
    monkeypatch.setattr(graphs_module, "MOST_ALIKE", 2)
    prompts = [prompt(seed, vocabulary=64) for seed in range(4)]
    with torch.no_grad():
        wanted = [generate(model, ids, 20) for ids in prompts]
    with session(graphs, replay=False) as opened:
        remote = copy.deepcopy(model).to("genie")
        states = [choose(*remote(ids.to("genie"))) for ids in prompts]
        rows = [[] for _ in prompts]
        for _ in range(20):
            for k in range(len(prompts)):
                row, states[k] = decode(remote, *states[k], 1)
                rows[k].append(row)
        seen = counters(opened)
    for row, output in zip(rows, wanted, strict=True):
        close(torch.cat(row, dim=1), output)
    assert seen["engine_failed"] == 1
    assert len(graphs.pool) <= 2


def test_the_number_alike_is_bounded():
    pool = GraphPool(1 << 30, repeated)
    steps = [Step(pool.add("a", instance).buffers, 1) for _ in range(MOST_ALIKE)]
    with pytest.raises(CaptureError, match=f"{MOST_ALIKE} generations"):
        pool.add("a", instance)
    del steps
    assert pool.find("a") is not None
