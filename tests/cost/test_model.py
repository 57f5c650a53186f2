"""A fit finds the device that made its samples, and predictions keep their contract."""

from __future__ import annotations

import json
import logging
import time

import msgspec
import pytest

from genie.cost.fit import fit
from genie.cost.judge import judge
from genie.cost.model import DeviceModel
from tests.cost.nodes import (
    BANDWIDTH,
    LAUNCH_S,
    RATE,
    add,
    linear,
    node,
    roofline,
    sample,
    samples,
    spec,
    view,
)


@pytest.fixture(scope="module")
def model() -> DeviceModel:
    return fit("a device", samples())


def test_ceilings_are_recovered(model):
    group = model.groups["float32"]["linear"]
    assert group.launch_s == pytest.approx(LAUNCH_S, rel=0.4)
    assert group.rate == pytest.approx(RATE, rel=0.05)
    assert model.groups["float32"]["elementwise add"].bandwidth == pytest.approx(BANDWIDTH, rel=0.05)


def test_sizes_between_the_measured_ones_are_predicted(model):
    unseen = [linear(m, k, n) for m in (2, 24, 200) for k in (128, 1024) for n in (256, 1500)]
    unseen += [add(3 * 4**i) for i in range(4, 10)]
    judgement = judge(model, [sample(n) for n in unseen])
    assert judgement.mape < 12
    assert judgement.spearman is not None and judgement.spearman > 0.98
    assert set(judgement.by_family) == {"matmul", "elementwise"}
    assert len(judgement.rows) == len(unseen)


def test_held_out_samples_do_not_teach(model):
    wrong = [sample(linear(8, 512, 512), 1.0, held_out=True), sample(add(4**6), 1.0, held_out=True)]
    without = [s for s in samples() if s.nodes[0].cost not in [w.nodes[0].cost for w in wrong]]
    # The same op and size under another name is held out as well.
    taught = fit("a device", [*samples(), *wrong])
    assert taught.to_json() == fit("a device", without).to_json()


def test_views_cost_nothing_and_order_is_kept(model):
    nodes = [add(64), view(64), linear(1, 512, 512), view(8), add(64)]
    seconds = model.seconds(nodes)
    assert (seconds[1], seconds[3]) == (0.0, 0.0)
    assert seconds[0] == seconds[4] > 0
    assert seconds[2] == pytest.approx(roofline(nodes[2]), rel=0.1)


def test_a_share_of_the_batch_still_reads_all_weights(model):
    bound_by_weights, bound_by_flops = linear(1, 2048, 2048), linear(512, 2048, 2048)
    whole, half = model.seconds([bound_by_flops])[0], model.seconds([bound_by_flops], 0.5)[0]
    assert half == pytest.approx(whole / 2, rel=0.15)
    whole, half = model.seconds([bound_by_weights])[0], model.seconds([bound_by_weights], 0.5)[0]
    assert half > 0.9 * whole
    assert model.seconds([add(2**20)], 0.25)[0] == pytest.approx(model.seconds([add(2**18)])[0])


def test_an_op_that_was_never_measured_is_predicted_by_its_bytes(model):
    strange = node("aten::erfinv.default", [spec(2**18)], spec(2**18))
    assert model.seconds([strange])[0] == pytest.approx(roofline(strange), rel=0.3)
    conv = node("aten::conv2d.default", [spec(1, 8, 9, 9), spec(8, 8, 3, 3)], spec(1, 8, 9, 9))
    assert 0 < model.seconds([conv])[0] < 1e-3


def test_a_dtype_that_was_not_measured_is_scaled_and_said_so(model, caplog):
    with caplog.at_level(logging.WARNING):
        half = model.seconds([add(2**20, "float16"), add(2**19, "float16")])
    assert half[0] == pytest.approx(model.seconds([add(2**20)])[0] / 2, rel=0.05)
    assert model.substituted == {"float16": "float32"}
    assert len(caplog.records) == 1
    assert "float16" in caplog.text


def test_json_gives_the_same_predictions(model):
    again = DeviceModel.from_json(model.to_json())
    nodes = [linear(3, 700, 900), add(12345)]
    assert again.seconds(nodes) == model.seconds(nodes)
    assert again.device == "a device"


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d.update(format=0),
        lambda d: d["dtypes"]["float32"]["linear"].update(bandwidth=0.0),
        lambda d: d["dtypes"]["float32"]["linear"]["points"].pop(),
        lambda d: d["dtypes"]["float32"].pop("elementwise"),
        lambda d: d.update(dtypes={}),
        lambda d: d.pop("device"),
    ],
)
def test_json_that_is_no_model_is_refused(model, change):
    stored = json.loads(model.to_json())
    change(stored)
    with pytest.raises(ValueError):
        DeviceModel.from_json(msgspec.json.encode(stored))


def test_a_model_without_elementwise_samples_is_refused():
    with pytest.raises(ValueError, match="elementwise"):
        fit("a device", [sample(linear(8, 8, 8))])


def test_predictions_of_a_large_graph_are_quick(model):
    """1,500 nodes in 5 ms, both at first sight and later."""
    kinds = [linear(1 + i, 768, 768) for i in range(30)] + [add(1000 + i) for i in range(30)] + [view(8)] * 15
    nodes = kinds * 20
    first, later = [], []
    for _ in range(7):
        fresh = DeviceModel(model.device, model.groups)
        fresh.seconds([*samples()[0].nodes, add(1)])  # the interpolations themselves are made once
        for found in (first, later):
            start = time.perf_counter()
            fresh.seconds(nodes)
            found.append(time.perf_counter() - start)
    assert min(later) < 5e-3
    assert min(first) < 10e-3


def test_judging_nothing_is_refused(model):
    with pytest.raises(ValueError, match="at least one sample"):
        judge(model, [])
