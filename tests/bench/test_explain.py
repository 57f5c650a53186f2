"""``genie explain``: plans of real servers, and what their alternatives take."""

import json
import subprocess
import sys
from contextlib import closing

import pytest
import torch

from genie.baselines.genie_remote import GenieFull
from genie.bench.explain.explaining import WARM_UP, Alternative, check_followed, request_seconds
from genie.bench.pool import StartedServers
from genie.bench.reference import Reference
from genie.config import IMPLEMENTED_FEATURES, POOL_FEATURES
from genie.devices import device_slot
from genie.errors import MeasurementError, VerificationError
from genie.runtime.open_pool import policies_of
from genie.scheduler.forced import Forced
from genie.workloads import make_workload


def explain(*arguments, timeout=120):
    return subprocess.run(
        [sys.executable, "-m", "genie", "explain", *arguments],
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def test_a_plan_and_its_alternatives_are_told_and_measured(tmp_path):
    found = tmp_path / "found.json"
    done = explain(
        "llm_prefill", "--profile", "smoke", "--servers", "2", "--measure", "2", "--json", str(found)
    )
    assert done.returncode == 0, done.stderr
    assert "plan of" in done.stdout and "over 2 servers" in done.stdout
    assert "prefill transformer" in done.stdout, "the phase and the modules are named"
    assert "regret of the chosen plan" in done.stdout
    rows = json.loads(found.read_text())
    assert {row["policy"] for row in rows} >= {"colocation", "prefill"}
    assert sum(row["chosen"] for row in rows) == 1
    assert all(row["measured_ms"] > 0 and row["predicted_ms"] > 0 for row in rows)


def test_without_the_feature_its_policy_is_not_asked():
    done = explain("llm_prefill", "--profile", "smoke", "--servers", "2", "--ablate", "phases,cost_model")
    assert done.returncode == 0, done.stderr
    assert "colocation" in done.stdout
    assert "prefill (" not in done.stdout and "predicted" not in done.stdout


@pytest.mark.parametrize(
    ("arguments", "remedy"),
    [
        (["llm_decode", "--ablate", "colocation"], "nothing is scheduled"),
        (["llm_decode", "--ablate", "caching"], "choose from residency"),
        (["llm_decode", "--json", "x.json"], "--measure"),
        (["llm_decode", "--servers", "1", "--profile", "smoke"], "--servers 2"),
    ],
)
def test_a_bad_option_names_its_remedy(arguments, remedy):
    done = explain(*arguments)
    assert done.returncode == 2
    assert remedy in done.stderr


@torch.no_grad()
def test_a_wrong_result_or_another_plan_is_no_measurement(tmp_path):
    """Each row is measured on verified responses, with the plan that it names."""
    workload = make_workload("llm_prefill", "smoke")
    local = device_slot("cpu", 0)
    reference, another = Reference(workload, local), Reference(workload, local)
    for parameter in another._model.parameters():
        parameter.neg_()
    forced = Forced(policies_of(POOL_FEATURES), "prefill", "2 shards")
    with (
        closing(StartedServers([local, device_slot("cpu", 1)], tmp_path)) as servers,
        closing(
            GenieFull(servers.addresses, servers.token, frozenset(IMPLEMENTED_FEATURES), policies=[forced])
        ) as full,
    ):
        full.prepare(workload)
        with pytest.raises(VerificationError, match="differs from the local one"):
            request_seconds(full, workload, 0, another)
        for index in range(WARM_UP):
            assert request_seconds(full, workload, index, reference) > 0
        check_followed(full, Alternative("prefill", "2 shards", False, None))
        with pytest.raises(MeasurementError, match=r"prefill \(2 shards\) was followed"):
            check_followed(full, Alternative("prefill", "3 shards", False, None))
