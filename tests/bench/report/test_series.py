"""Runs share a series only when their cells were measured under the same conditions."""

from __future__ import annotations

from genie.bench.report.series import group_runs
from genie.bench.results import load_results

from .stored import CLIENT, cell, write


def grouped(tmp_path, *runs):
    paths = [write(tmp_path / f"{hour}.json", cells, hour=hour) for hour, cells in enumerate(runs)]
    return group_runs(load_results(paths))


def test_comparable_runs_are_one_series_oldest_first(tmp_path):
    series = grouped(tmp_path, *[[cell("llm_decode", "ray", 0.1 * n)] for n in (3, 1, 2)])
    assert [
        [round(next(iter(run.facts.values())).cell.median_s, 6) for run in one.runs] for one in series
    ] == [[0.3, 0.1, 0.2]]


def test_another_machine_starts_a_series_and_is_named(tmp_path):
    here, there = [cell("llm_decode", "ray")], [cell("llm_decode", "ray", client=CLIENT | {"cores": 64})]
    series = grouped(tmp_path, here, there, here)
    assert [len(one.runs) for one in series] == [2, 1]
    assert series[1].differs == ["fingerprint.client.cores: 64, not 4"]


def test_other_weights_start_a_series(tmp_path):
    other = cell("llm_decode", "ray", weights={"source": "pretrained", "sha256": "cd" * 32})
    assert len(grouped(tmp_path, [cell("llm_decode", "ray")], [other])) == 2


def test_runs_without_a_common_cell_are_compared_by_host_and_profile(tmp_path):
    decode, prefill = [cell("llm_decode", "ray")], [cell("llm_prefill", "ray")]
    assert len(grouped(tmp_path, decode, prefill)) == 1
    assert len(grouped(tmp_path, decode, [cell("llm_prefill", "ray", profile="cpu")])) == 2


def test_a_difference_is_found_against_every_earlier_run(tmp_path):
    """The second run alone has the cell that the third disagrees with."""
    series = grouped(
        tmp_path,
        [cell("llm_decode", "ray")],
        [cell("llm_decode", "ray"), cell("llm_prefill", "ray")],
        [cell("llm_prefill", "ray", client=CLIENT | {"python": "3.12"})],
    )
    assert [len(one.runs) for one in series] == [2, 1]


def test_cells_that_the_newest_run_lacks_are_told(tmp_path):
    both = [cell("llm_decode", "ray"), cell("llm_decode", "genie_full")]
    (series,) = grouped(tmp_path, both, both[:1])
    assert [facts.cell.name for facts in series.gone] == ["test_llm_decode[genie_full]"]
