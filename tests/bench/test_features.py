"""Ablations are believed only when the servers' own counters show them."""

import pytest

from genie.baselines.protocol import PlanSummary, Receipt, Reply
from genie.bench.features import FORESEEN_FROM, REPLAYED_FROM, check_features, require_ablatable
from genie.config import IMPLEMENTED_FEATURES, POOL_FEATURES
from genie.errors import ConfigError, ReceiptError
from genie.workloads.protocol import Response

BOTH = frozenset({"residency", "colocation"})
STATE_BYTES = 512 * 64


def reply(*programs, pids=(1,)):
    """A reply with one receipt per pid; ``programs`` tells for each program whether it was stateless."""
    counters = {"stateless": sum(programs)} if any(programs) else {}
    receipts = [Receipt(pid, "cpu", "n", len(programs), len(programs), "d", counters) for pid in pids]
    return Reply(Response({}), receipts)


def check(replies, baseline="genie_full", features=BOTH, servers=2):
    check_features(replies, baseline=baseline, features=features, servers=servers, where="here")


@pytest.mark.parametrize(
    ("replies", "baseline", "features"),
    [
        ([reply(False, False)], "genie_full", BOTH),
        ([reply(False, False)], "genie_local_remote", frozenset()),
        ([reply(True), reply(True, pids=(2,))], "genie_no_semantics", frozenset()),
        ([reply(True, pids=(1, 2))], "genie_full", frozenset({"residency"})),
        ([reply(True, True)], "genie_full", frozenset({"colocation"})),
    ],
)
def test_counters_that_fit_the_features_are_believed(replies, baseline, features):
    check(replies, baseline, features)


@pytest.mark.parametrize(
    ("replies", "baseline", "features", "message"),
    [
        ([reply(False, True)], "genie_full", BOTH, "residency was not really on"),
        ([reply(True)], "genie_local_remote", frozenset(), "residency was not really on"),
        ([reply(False, True)], "genie_full", frozenset({"colocation"}), "residency was not really off"),
        ([reply(False, pids=(1, 2))], "genie_full", frozenset({"residency"}), "residency was not really off"),
        ([reply(False)], "genie_no_semantics", frozenset(), "residency was not really off"),
        ([reply(True), reply(True)], "genie_full", frozenset({"residency"}), "colocation was not really off"),
        ([reply(True), reply(True)], "genie_no_semantics", frozenset(), "colocation was not really off"),
        ([reply(False, pids=(1, 2))], "genie_full", BOTH, "colocation was not really on"),
    ],
)
def test_counters_that_contradict_the_features_are_refused(replies, baseline, features, message):
    with pytest.raises(ReceiptError, match=message):
        check(replies, baseline, features)


def replayed(programs, ops):
    return Reply(
        Response({}), [Receipt(1, "cpu", "n", ops, 3, "d", {"replayed": programs} if programs else {})]
    )


def test_replay_is_believed_when_the_servers_counted_it():
    check([replayed(2, REPLAYED_FROM)], features=BOTH | {"replay"})
    check([replayed(0, REPLAYED_FROM)], features=BOTH)
    check([replayed(0, REPLAYED_FROM - 1)], features=BOTH | {"replay"})  # too little to be worth it
    check([replayed(0, REPLAYED_FROM)], baseline="genie_local_remote")


@pytest.mark.parametrize(
    ("programs", "baseline", "features", "message"),
    [
        (0, "genie_full", BOTH | {"replay"}, "replay was not really on.*--genie-ablate replay"),
        (1, "genie_full", BOTH, "replay was not really off"),
        (1, "genie_local_remote", frozenset(), "replay was not really off"),
    ],
)
def test_replay_that_the_counters_contradict_is_refused(programs, baseline, features, message):
    with pytest.raises(ReceiptError, match=message):
        check([replayed(programs, REPLAYED_FROM)], baseline, features)


def decoded(tokens, counters, device="cpu:0 AMD EPYC"):
    response = Response({}, token_s=[0.1 * (k + 1) for k in range(tokens)])
    return Reply(response, [Receipt(1, device, "n", 9, 3, "d", counters)])


GPU = "cuda:0 NVIDIA H200"


@pytest.mark.parametrize(
    ("reply", "features"),
    [
        (decoded(FORESEEN_FROM, {"ahead": 5, "ahead_missed": 1}), {"run_ahead"}),
        (decoded(FORESEEN_FROM, {}), set()),
        (decoded(FORESEEN_FROM - 1, {}), {"run_ahead", "compiled"}),
        (decoded(FORESEEN_FROM, {"rewritten": 2}), {"compiled"}),
        (decoded(FORESEEN_FROM, {}), {"compiled"}),
        (decoded(FORESEEN_FROM, {"engine_graph": 9}, GPU), {"compiled"}),
    ],
)
def test_what_servers_count_of_engines_and_of_running_ahead_is_believed(reply, features):
    check_features([reply], baseline="genie_full", features=BOTH | features, servers=1, where="", greedy=True)
    if features:
        check_features(
            [decoded(99, {}, GPU)], baseline="genie_full", features=BOTH | features, servers=1, where=""
        )


@pytest.mark.parametrize(
    ("reply", "baseline", "features", "message"),
    [
        (decoded(FORESEEN_FROM, {"ahead": 1}), "genie_full", {"compiled"}, "run_ahead was not really off"),
        (decoded(1, {"ahead_missed": 1}), "genie_full", set(), "run_ahead was not really off"),
        (decoded(1, {"ahead": 1}), "genie_local_remote", set(), "run_ahead was not really off"),
        (decoded(1, {"rewritten": 1}), "genie_full", {"run_ahead"}, "compiled was not really off"),
        (decoded(1, {"engine_graph": 1}), "genie_local_remote", set(), "compiled was not really off"),
        (decoded(FORESEEN_FROM, {}), "genie_full", {"run_ahead"}, "run_ahead was not .* on.*--genie-ablate"),
        (decoded(FORESEEN_FROM, {"ahead_missed": 3}), "genie_full", {"run_ahead"}, "run_ahead was not .* on"),
        (decoded(FORESEEN_FROM, {}, GPU), "genie_full", {"compiled"}, "compiled was not really on"),
    ],
)
def test_what_contradicts_engines_or_running_ahead_is_refused(reply, baseline, features, message):
    with pytest.raises(ReceiptError, match=message):
        check_features(
            [reply], baseline=baseline, features=BOTH | features, servers=1, where="here", greedy=True
        )


def test_an_ablation_that_the_pool_cannot_show_is_refused():
    require_ablatable({"colocation", "phases"}, servers=2)
    require_ablatable({"residency", "replay", "compiled", "run_ahead"}, servers=1)
    for feature in ("colocation", *POOL_FEATURES):
        with pytest.raises(ConfigError, match=f"{feature} changes nothing.*--genie-servers 2"):
            require_ablatable({feature}, servers=1)


def planned(policy, predicted_ms, pids=(1,), worked=None):
    plan = PlanSummary(policy, "", "because", pids, predicted_ms)
    receipts = [Receipt(pid, "cpu", "n", 3, 1, "d") for pid in (pids if worked is None else worked)]
    return Reply(Response({}), receipts, plans=[plan])


SPLIT = BOTH | {"phases", "cost_model"}


def test_plans_that_fit_the_features_are_believed():
    check([planned("prefill", 1.0, (1, 2))], features=SPLIT)
    check([planned("colocation", 1.0)], features=SPLIT)
    check([planned("prefill", None, (1, 2))], features=BOTH | {"phases"})
    check([planned("policy of a user's own", 1.0, (1, 2))], features=SPLIT)


@pytest.mark.parametrize(
    ("reply", "features", "message"),
    [
        (planned("prefill", 1.0, (1, 2)), BOTH | {"branches", "cost_model"}, "phases was not really off"),
        (planned("branches", 1.0, (1, 2)), SPLIT, "branches was not really off"),
        (planned("colocation", 1.0), BOTH, "cost_model was not really off"),
        (planned("colocation", None), SPLIT, "cost_model was not really on"),
        (planned("prefill", 1.0, (1, 2), worked=(1,)), SPLIT, "the plans were not followed"),
        (planned("colocation", 1.0, (1,), worked=(1, 2)), SPLIT, "the plans were not followed"),
    ],
)
def test_plans_that_contradict_the_features_are_refused(reply, features, message):
    with pytest.raises(ReceiptError, match=message):
        check([reply], features=features)


@pytest.fixture(scope="module")
def ablations(runs, servers):
    """extra_info by what was ablated; "no_semantics" is the baseline of that name."""
    runs.cells("Stateful")
    addresses = ",".join(server.address for server in servers)
    common = ["--genie-address", addresses, "--genie-baselines"]
    token = {"GENIE_TOKEN": "right"}
    whole, residency, colocation, one = runs(
        (token, [*common, "local_pytorch,genie_no_semantics,genie_full"]),
        (token, [*common, "genie_full", "--genie-ablate", "residency"]),
        (token, [*common, "genie_full", "--genie-ablate", "colocation"]),
        (token, ["--genie-address", servers[0].address, *common[2:], "genie_full",
                 "--genie-ablate", "colocation"]),
        timeout=90,
    )  # fmt: skip

    def info(run, baseline="genie_full"):
        output, saved = run
        assert f"test_stateful[{baseline}]" in saved, output
        return saved[f"test_stateful[{baseline}]"]["extra_info"]

    return {
        "": info(whole), "no_semantics": info(whole, "genie_no_semantics"),
        "residency": info(residency), "colocation": info(colocation), "colocation of one": one[0],
    }  # fmt: skip


def stateless(info):
    return sum(receipt["counters"].get("stateless", 0) for receipt in info["receipts"])


def test_with_all_features_state_stays_on_one_server(ablations):
    info = ablations[""]
    assert info["features"] == list(IMPLEMENTED_FEATURES)
    assert stateless(info) == 0
    assert info["devices"] == 1
    assert info["wire"]["bytes_out"] < STATE_BYTES


@pytest.mark.parametrize(
    ("ablated", "features", "devices"),
    [
        ("residency", ["colocation", "replay"], 1),
        ("colocation", ["replay"], 2),
        ("no_semantics", [], 2),
    ],
)
def test_without_a_feature_state_travels_with_every_program(ablations, ablated, features, devices):
    info = ablations[ablated]
    assert info["features"] == features
    assert stateless(info) == info["receipt"]["programs"] == 2
    assert info["devices"] == len({receipt["pid"] for receipt in info["receipts"]}) == devices
    assert info["wire"]["bytes_out"] > STATE_BYTES
    assert info["wire"]["bytes_in"] > STATE_BYTES


def test_an_ablation_that_changes_nothing_fails_its_cell(ablations):
    assert "ConfigError: --genie-ablate colocation changes nothing" in ablations["colocation of one"]
