"""The plot of the cost model: which points it has, where they lie, and what it says of them."""

from __future__ import annotations

import re

from genie.bench.report.charts import ScatterPoint, scatter
from genie.bench.report.command import run
from tests.bench.report.stored import CASES, cell, write


def predicted(case: int, held_out: bool) -> dict[str, float | bool]:
    times = {"remote_ms": 0.5 + case, "predicted_ms": 0.6 + case}
    return {"median_s": 1e-3, "min_s": 1e-3, **times, "held_out": held_out}


def page(tmp_path, benchmarks) -> str:
    import argparse

    from genie.bench.report.command import add_arguments

    parser = argparse.ArgumentParser()
    add_arguments(parser)
    out = tmp_path / "report.html"
    assert run(parser.parse_args([str(write(tmp_path / "r.json", benchmarks)), "-o", str(out)])) == 0
    return out.read_text()


def test_a_predicted_row_has_a_plot_with_its_error(tmp_path):
    cases = {name: predicted(k, k % 3 == 1) for k, name in enumerate(CASES)}
    row = cell("microbenchmark", "genie_full", cases=cases, cost_model={"mape": 12.4, "spearman": 0.987})
    html = page(tmp_path, [cell("microbenchmark", "local_pytorch"), row])
    held_out = sum(k % 3 == 1 for k in range(len(CASES)))
    assert f"{len(CASES)} ops and sizes, {held_out} of them held out" in html
    assert "mean absolute error 12 %" in html
    assert "rank correlation 0.99" in html
    assert html.count('<circle class="held"') == held_out
    assert f"{CASES[0]}: measured 0.5 ms, predicted 0.6 ms" in html


def test_a_run_without_a_calibration_says_how_to_make_one(tmp_path):
    html = page(tmp_path, [cell("microbenchmark", "local_pytorch"), cell("microbenchmark", "genie_full")])
    assert "<circle" not in html
    assert "genie calibrate" in html


def test_equal_times_lie_on_the_diagonal():
    chart = scatter([ScatterPoint(v, v, "dot", "a case") for v in (1e-5, 3e-4, 2e-2)], "title")
    found = [tuple(map(float, at)) for at in re.findall(r'cx="([\d.]+)" cy="([\d.]+)"', chart)]
    axis = re.search(r'class="axis" d="M([\d.]+) ([\d.]+)L([\d.]+) ([\d.]+)"', chart)
    assert axis is not None
    left, floor, _, _ = map(float, axis.groups())
    assert all(abs((x - left) - (floor - y)) < 0.2 for x, y in found)
    assert sorted(found) == found
