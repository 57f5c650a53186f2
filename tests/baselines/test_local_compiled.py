"""The reference row: compiled, verified like every other row, and never the eager one by another name."""

from __future__ import annotations

import pytest
import torch
from tiny_workload import TinyWorkload
from torch import nn

from genie.baselines import local_compiled
from genie.baselines.local_compiled import LocalCompiled, graphs_compiled, require_compiler
from genie.baselines.local_pytorch import LocalPytorch
from genie.devices import device_slot
from genie.errors import ConfigError, MeasurementError, SessionClosedError
from genie.workloads.llm_decode import LlmDecode
from genie.workloads.profiles import DecodeSize, Gpt2Shape

pytestmark = pytest.mark.timeout(400)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """As a cell on a small machine has: kernels are compiled for the number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def baseline():
    made = LocalCompiled(device_slot("cpu", 0))
    yield made
    made.close()


def check_same_as_eager(baseline, workload):
    """Three requests of other indices than `prepare`'s; returns the setup."""
    setup = baseline.prepare(workload)
    eager = LocalPytorch(device_slot("cpu", 0))
    assert setup.model == eager.prepare(workload).model
    model = workload.build_model()
    before = graphs_compiled()
    for index in range(3):
        request = workload.request(index)
        response, reference = baseline.run(request), eager.run(request)
        reply = baseline.account()
        assert reply.response is response
        assert reply.receipts == []
        assert (reply.wire.bytes_out, reply.wire.bytes_in) == (0, 0)
        verdict = workload.verify(model, request, response, reference)
        assert verdict.ok, verdict.detail
    assert graphs_compiled() == before, "nothing is compiled in a request that is timed"
    return setup


def test_a_model_is_compiled_once_and_gives_the_eager_result(baseline):
    assert (baseline.name, baseline.remote) == ("local_compiled", False)
    before = graphs_compiled()
    setup = check_same_as_eager(baseline, TinyWorkload(splittable=False))
    assert graphs_compiled() > before
    assert setup.setup_ms["compile"] > 0
    assert setup.devices == 1


def test_decoding_has_a_static_cache_kept_between_requests_and_a_compiled_step(baseline):
    shape = Gpt2Shape("gpt2-1l-32", width=32, layers=1, heads=2, vocab=64, positions=32)
    workload = LlmDecode("smoke", DecodeSize(shape, prompt=4, new_tokens=5))
    check_same_as_eager(baseline, workload)
    generate = baseline._model.generate
    (cache,) = generate._caches.values()
    assert generate._caches.keys() == {(1, 9)}
    assert cache.layers[0].keys.shape == (1, 2, 9, 16)
    assert int(cache.layers[0].cumulative_length) == 4 + 5 - 1


class Uncalled(TinyWorkload):
    """Its program computes with the weights and never calls the model."""

    def run(self, model, request, device):
        from genie.workloads.protocol import Response

        return Response({"y": request.inputs["x"] @ model.module.weight.t()})


def test_a_row_in_which_nothing_is_compiled_is_an_error(baseline):
    with pytest.raises(MeasurementError, match="compiled nothing of tiny"):
        baseline.prepare(Uncalled())


def test_each_tower_is_compiled_where_the_workload_calls_towers(monkeypatch):
    monkeypatch.setitem(local_compiled.TOWERS, "two", ("left", "right"))
    model = nn.ModuleDict({"left": nn.Linear(2, 2), "right": nn.Linear(2, 2), "head": nn.Linear(2, 2)})
    made = local_compiled.compiled(model, "two")
    assert made is model
    assert [type(part).__name__ for part in model.values()] == ["Replayed", "Replayed", "Linear"]


def test_without_a_compiler_the_row_is_refused_with_the_remedy(monkeypatch):
    monkeypatch.setenv("CXX", "/no/such/compiler")
    with pytest.raises(ConfigError, match=r"needs a C\+\+ compiler.*name it in \$CXX"):
        require_compiler("cpu")
    with pytest.raises(ConfigError):
        LocalCompiled(device_slot("cpu", 0))


def test_it_runs_between_prepare_and_close_only(baseline):
    with pytest.raises(SessionClosedError):
        baseline.run(TinyWorkload().request(0))
    with pytest.raises(SessionClosedError):
        baseline.account()
