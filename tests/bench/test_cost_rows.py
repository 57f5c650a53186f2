"""Predictions are put beside the measured cases, and judged on held-out ones alone."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest

from genie.bench.cost_rows import add_predictions
from genie.cost import store
from genie.cost.fit import fit
from genie.device_facts import DeviceFacts
from tests.cost.nodes import samples

FACTS = DeviceFacts("cpu", "A CPU", 1, "2")
ROWS = {
    "held_out": {"rows": [["a/1", "matmul", 1.0, 0.0011], ["b/1", "norm", 1.0, 0.0018]]},
    "fitted": {"rows": [["a/2", "matmul", 1.0, 0.5]]},
}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("GENIE_CACHE_DIR", str(tmp_path))


def judged(facts: DeviceFacts = FACTS) -> dict:
    names = ("a/1", "a/2", "b/1", "c/1")
    info = {"model": {"dtype": "float32"}, "cases": {name: {"median_s": 0.01} for name in names}}
    timed = [
        # Beside other processes wall clock is three times the processor's time.
        SimpleNamespace(case=name, reply=SimpleNamespace(phases_ms={"remote": 3 * v}, server_cpu_s=v * 1e-3))
        for name in names
        for v in (1.0, 1.0, 7.0)
    ]
    add_predictions(info, SimpleNamespace(timed=timed), facts)
    return info


def test_a_calibrated_device():
    store.save(replace(fit("cpu:0", samples()), key=store.key_of(FACTS), measured={"float32": ROWS}))
    info = judged()
    assert info["cases"]["a/1"] | {"predicted_ms": 0} == {
        "median_s": 0.01, "remote_ms": 3.0, "measured_ms": 1.0, "predicted_ms": 0, "held_out": True,
    }  # fmt: skip
    assert info["cases"]["a/1"]["predicted_ms"] == pytest.approx(1.1)
    assert info["cases"]["a/2"]["held_out"] is False
    assert info["cases"]["c/1"]["predicted_ms"] is None
    assert info["cost_model"]["mape"] == pytest.approx((10 + 80) / 2)
    assert info["cost_model"]["clock"] == "cpu"


def test_a_device_of_several_cores_is_judged_by_wall_clock():
    facts = DeviceFacts("cpu", "A CPU", 2, "2")
    store.save(replace(fit("cpu:0", samples()), key=store.key_of(facts), measured={"float32": ROWS}))
    info = judged(facts)
    assert info["cases"]["a/1"]["measured_ms"] == 3.0
    assert info["cost_model"]["clock"] == "wall"


def test_a_device_that_is_not_calibrated():
    info = judged()
    assert info["cost_model"] is None
    assert all(case["predicted_ms"] is None and case["measured_ms"] == 1.0 for case in info["cases"].values())
