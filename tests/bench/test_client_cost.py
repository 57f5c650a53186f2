"""What the client costs: real clients and servers, what is recorded of them, and what is refused."""

import json

import pytest
import torch

from genie.bench.client_cost.works import Generation, Measured
from genie.bench.gate.suite_run import suite_arguments
from genie.errors import VerificationError
from genie.workloads.protocol import Request
from tests.bench.gate.inputs import cell, result
from tests.bench.test_runs import KEYS

COSTS = """
import pytest
from genie.bench.client_cost import works

class WrongOps(works.HotOps):
    def run(self, model, request, device):
        measured = super().run(model, request, device)
        measured.outputs["y"] += torch_is_genie(device)
        return measured

def torch_is_genie(device):
    return float("genie" in str(device))

class FewOps(works.HotOps):
    rounds = 3

@pytest.mark.genie_gated
def test_ops(benchmark, client_cost):
    client_cost.measure(benchmark, FewOps())

def test_wrong(benchmark, client_cost):
    client_cost.measure(benchmark, WrongOps())

@pytest.mark.parametrize("capture", ["lazy", "replayed"])
def test_steps(benchmark, client_cost, capture):
    client_cost.measure(benchmark, works.DecodeSteps(1, rounds=3), capture)

@pytest.mark.parametrize("capture", ["replayed"])
def test_never_replayed(benchmark, client_cost, capture, monkeypatch):
    monkeypatch.setattr("genie.frontend.replay.automatic.LEAST_OPS", 10**6)
    client_cost.measure(benchmark, works.DecodeSteps(1, rounds=3), capture)

@pytest.mark.genie_profiles("gpu")
@pytest.mark.parametrize("capture", ["replayed"])
def test_large(benchmark, client_cost, capture):
    client_cost.measure(benchmark, works.DecodeSteps(48), capture)
"""
COMMON = ("--genie-device", "cpu", "--genie-profile", "smoke", "-p", "no:cacheprovider")


def test_what_is_verified_is_recorded_beside_eager_pytorch_and_nothing_else_is(pytester):
    pytester.makepyfile(COSTS)
    run = pytester.runpytest_subprocess(
        "--benchmark-only", "--benchmark-json", "out.json", "--genie-servers", "1", *COMMON
    )
    run.assert_outcomes(passed=3, failed=2, deselected=1)
    run.stdout.fnmatch_lines(
        [
            "*VerificationError: op, captured before, y: 1.0* off eager PyTorch's, more than 0.0001",
            "*ReceiptError: decode step, 1 layers, replayed:*",
            "*cost of the client *genie *eager *ratio *target *bytes/token *trips/token",
            "*op, captured before, lazy *ms/op *ms *x *",
            "*op, captured before, lazy *FAILED",
            "*decode step, 1 layers, lazy *ms/step *ms *x *",
            "*decode step, 1 layers, replayed *ms/step *ms *x *",
            "*decode step, 1 layers, replayed *FAILED",
        ]
    )
    benches = {one["name"]: one for one in json.loads((pytester.path / "out.json").read_text())["benchmarks"]}
    assert benches.keys() == {"test_ops", "test_steps[lazy]", "test_steps[replayed]"}
    for name, bench in benches.items():
        info, cost = bench["extra_info"], bench["extra_info"]["client_cost"]
        assert not KEYS - info.keys()
        assert (info["workload"], info["verified"]["ok"], info["rounds"]) == ("client_cost", True, 3)
        assert info["baseline"] == ("genie_full" if "replayed" in name else "genie_local_remote")
        assert ("replay" in info["features"]) == ("replayed" in name)
        assert bench["group"] == f"client cost: {cost['case']}"
        assert bench["stats"]["median"] == pytest.approx(cost["median_s"], rel=1e-6)
        assert len(bench["stats"]["data"]) == len(cost["eager_rounds_s"]) == 3
        assert cost["median_s"] > 0 and cost["eager_median_s"] > 0 and cost["ratio"] > 0
        assert info["wire"]["bytes_out"] > 0 and info["wire"]["round_trips"] == 1
    replayed = benches["test_steps[replayed]"]["extra_info"]["client_cost"]
    lazy = benches["test_steps[lazy]"]["extra_info"]["client_cost"]
    assert replayed["ratio"] < lazy["ratio"]


def names_of(pytester, *arguments):
    pytester.makepyfile(COSTS)
    run = pytester.runpytest_inprocess("--collect-only", "-q", *COMMON, *arguments)
    return [line.partition("::")[2] for line in run.outlines if "::" in line]


def test_each_goes_with_its_baseline_and_its_profile(pytester):
    assert names_of(pytester, "--genie-baselines", "local_pytorch") == []
    assert names_of(pytester, "--genie-baselines", "genie_full") == [
        "test_steps[replayed]", "test_never_replayed[replayed]"
    ]  # fmt: skip
    assert names_of(pytester, "--genie-baselines", "genie_local_remote") == [
        "test_ops", "test_wrong", "test_steps[lazy]"
    ]  # fmt: skip
    assert "test_large[replayed]" in names_of(pytester, "--genie-profile", "gpu")


def test_the_gate_takes_what_is_marked_for_it(pytester):
    from genie.bench.gate.pairs import Suite

    arguments = Suite().arguments()
    assert names_of(pytester, *arguments[1:3]) == ["test_ops"]


def test_without_the_feature_replay_is_skipped(pytester):
    pytester.makepyfile(COSTS)
    run = pytester.runpytest_subprocess(
        "--benchmark-only", "--genie-servers", "1", "--genie-ablate", "replay", "-k", "replayed", *COMMON
    )
    run.assert_outcomes(skipped=2, deselected=4)
    run.stdout.fnmatch_lines(["*the feature replay is switched off*"])


def test_rounds_of_a_client_cost_are_its_own():
    cost = cell("genie_full", workload="client_cost", client_cost={"capture": "lazy"}, rounds=(1.0,) * 15)
    arguments = suite_arguments(result(cell("genie_full"), cost), None)
    assert arguments[arguments.index("--genie-rounds") + 1] == "5"


def test_tokens_that_eager_pytorch_would_not_choose_are_refused():
    work = Generation(1, rounds=1)
    model, request = work.build_model(), work.request(0, "4")
    with torch.no_grad():
        good = work.run(model, request, "cpu")
        assert work.check(model, request, good, Measured({})) <= 1e-6
        wrong = good.outputs["ids"].clone()
        wrong[0, -1] = (wrong[0, -1] + 1) % 128
        with pytest.raises(VerificationError, match="eager PyTorch generates others"):
            work.check(model, request, Measured({"ids": wrong}), Measured({}))
        other = Request(1, {"ids": (request.inputs["ids"] + 1) % 128}, "4")
        with pytest.raises(VerificationError, match="another prompt"):
            work.check(model, other, good, Measured({}))
