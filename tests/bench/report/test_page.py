"""What the page says, read from its HTML."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest

from genie.bench.options import features_without
from genie.bench.report.numbers import MINUS, TIMES
from genie.bench.report.page import render
from genie.bench.report.series import group_runs
from genie.bench.report.tables import heat_class
from genie.bench.results import load_results
from genie.config import IMPLEMENTED_FEATURES

from .stored import CLIENT, cell, matrix, write

HOSTILE = """</script><script>window.pwned=1</script><img src=x onerror="window.pwned=1">'"&"""


def page(tmp_path, *runs, **more):
    """The page of these runs, each a list of benchmarks."""
    paths = [
        write(tmp_path / f"{hour}.json", cells, hour=hour, commit=f"{hour:040x}"[::-1], **more)
        for hour, cells in enumerate(runs)
    ]
    return render(group_runs(load_results(paths)))


def words(html: str) -> str:
    """Text alone, in one line."""
    found: list[str] = []

    class Reader(HTMLParser):
        def handle_data(self, data: str) -> None:
            found.append(data)

    Reader().feed(html)
    return " ".join(" ".join(found).split())


def test_the_head_says_what_was_measured(tmp_path):
    text = words(page(tmp_path, matrix()))
    assert "35 of 35 cells verified" in text
    assert "profile smoke" in text
    assert "weights seeded" in text
    assert "Test CPU" in text
    assert "2 devices reach at most 1.90x" in text


def test_a_cell_that_was_not_verified_stands_out(tmp_path):
    bad = cell("llm_decode", "ray", verified={"ok": False, "kind": "tokens", "max_abs_err": None})
    html = page(tmp_path, [bad, cell("llm_decode", "local_pytorch")])
    assert '<span class="bad">1 of 2 cells verified</span>' in html
    assert "not verified" in words(html)


def test_different_fingerprints_are_named_and_never_joined(tmp_path):
    here, there = cell("llm_decode", "ray"), cell("llm_decode", "ray", client=CLIENT | {"cores": 64})
    html = page(tmp_path, [here], [there])
    assert "These files were not measured under the same conditions" in html
    assert "fingerprint.client.cores: 64, not 4" in html
    assert html.count('<section aria-labelledby="s') > html.count("<polyline") == 0


def test_runs_of_one_machine_have_a_trend_with_every_commit(tmp_path):
    html = page(tmp_path, *[[cell("llm_decode", "ray", 0.1 + hour / 100)] for hour in range(8)])
    assert "not measured under the same conditions" not in html
    (line,) = re.findall(r'<polygon class="band".*?</svg>', html)
    assert line.count("<circle") == 8
    for hour in range(8):
        assert f"{hour:040x}"[::-1][:7] in words(html)


def test_a_run_without_ablation_names_the_option(tmp_path):
    assert "--genie-ablate all" in words(page(tmp_path, matrix()))


def test_an_ablated_row_is_held_against_the_full_one(tmp_path):
    full = cell("llm_decode", "genie_full", 0.1)
    without = cell("llm_decode", "genie_full", 0.25, ablated=("residency",))
    without["extra_info"]["wire"]["bytes_out"] = 10 * 14885 + 9 * 1470
    html = page(tmp_path, [full, without])
    assert ">without residency<" in html
    assert f"2.50{TIMES}" in words(html)
    assert f"10.0{TIMES}" in words(html)
    assert "--genie-ablate all" not in words(html)


def test_a_feature_that_went_off_with_another_is_named(tmp_path):
    full = cell("llm_decode", "genie_full")
    features = sorted(features_without(["colocation"]))
    without = cell("llm_decode", "genie_full", ablated=("colocation",), features=features)
    lost = [f for f in IMPLEMENTED_FEATURES if f not in features and f != "colocation"]
    assert f">without {', '.join(['colocation', *lost])}<" in page(tmp_path, [full, without])


def test_a_plan_stands_beside_what_was_measured(tmp_path):
    """The window's prediction is 20 % short of the request's time."""
    planned = cell("llm_prefill", "genie_full", 0.1)
    planned["extra_info"]["plan"] = {
        "predicted_ms": 80.0, "measured_ms": 100.0, "windows": 1,
        "policies": [{"policy": "prefill", "label": "2 shards", "why": "batch of 4 as 2 + 2",
                      "servers": 2, "windows": 1}],
    }  # fmt: skip
    text = words(page(tmp_path, [planned]))
    assert "prefill 2 shards" in text
    assert f"{MINUS}20.0%" in text
    assert "batch of 4 as 2 + 2" in text


def test_a_run_without_plans_says_so(tmp_path):
    assert "No row of this run was scheduled" in words(page(tmp_path, [cell("llm_decode", "genie_full")]))


def test_a_microbenchmark_is_compared_by_the_median_over_its_ops(tmp_path):
    """As the suite's own ratio is: one op that dwarfs the others does not decide."""
    full, other = cell("microbenchmark", "genie_full", 0.1), cell("microbenchmark", "genie_no_semantics", 0.3)
    other["extra_info"]["cases"]["matmul/64"]["median_s"] = 100.0
    assert f"3.00{TIMES}" in words(page(tmp_path, [full, other]))


def test_phases_that_overlap_are_told_and_not_hidden(tmp_path):
    cells = [cell("llm_decode", "genie_full", 0.05), cell("llm_decode", "genie_local_remote", 0.1)]
    rows = re.findall(
        r'<th scope="row">(genie_\w+)</th><td class="text"><svg(.*?)</tr>', page(tmp_path, cells)
    )
    (phases,) = [dict(rows[i : i + 2]) for i in range(len(rows)) if "capture" in rows[i][1]][:1]
    told = {name: re.findall(r'data-v="([\d.]+)"', row)[-3:] for name, row in phases.items()}
    # other, overlap and the median in milliseconds; the phases of both add up to 70 ms.
    assert [float(value) for value in told["genie_full"]] == pytest.approx([0, 20, 50])
    assert [float(value) for value in told["genie_local_remote"]] == pytest.approx([30, 0, 100])


def test_percentiles_without_enough_samples_are_not_available(tmp_path):
    text = words(page(tmp_path, [cell("llm_decode", "ray", rounds=30)]))
    assert "needs 59 samples, has 30" in text
    assert "needs 29 samples" not in text
    assert "Wilks 1941" in text


def test_a_file_without_raw_samples_says_so(tmp_path):
    bare = cell("llm_decode", "ray")
    del bare["stats"]["data"]
    text = words(page(tmp_path, [bare]))
    assert "no raw samples" in text
    assert "no samples stored" in text


def test_a_single_sample_and_equal_samples_have_pictures(tmp_path):
    single, equal = cell("llm_decode", "ray", rounds=1), cell("llm_decode", "local_pytorch")
    equal["stats"] |= dict.fromkeys(("min", "max", "median", "q1", "q3"), 0.1) | {"data": [0.1] * 7}
    html = page(tmp_path, [single, equal], [single, equal])
    assert html.count("Latency histogram") == 2
    assert html.count('<polygon class="band"') == 2
    assert "nan" not in html


def test_cells_that_vanished_are_told(tmp_path):
    both = [cell("llm_decode", "ray"), cell("llm_decode", "genie_full")]
    text = words(page(tmp_path, both, both[:1]))
    assert "Cells that the newest run lacks: test_llm_decode[genie_full]" in text


def test_nothing_in_a_file_can_inject(tmp_path):
    bad = cell(
        HOSTILE,
        HOSTILE,
        ablated=(HOSTILE,),
        client={HOSTILE: HOSTILE},
        profile=HOSTILE,
        model={"name": HOSTILE},
    )
    commit = {"id": HOSTILE, "dirty": True, "branch": HOSTILE}
    path = write(tmp_path / "hostile'\"&.json", [bad], commit_info=commit, datetime=HOSTILE)
    html = render(group_runs(load_results([path])))
    assert words(html).count("window.pwned=1</script>") > 5  # there, but as text
    tags: list[str] = []
    attributes: list[str] = []

    class Reader(HTMLParser):
        def handle_starttag(self, tag, attrs):
            tags.append(tag)
            attributes.extend(name for name, _ in attrs)

    Reader().feed(html)
    assert tags.count("script") == 1
    assert "img" not in tags
    assert [name for name in attributes if name.startswith("on")] == []


def test_nothing_is_loaded_from_elsewhere(tmp_path):
    html = page(tmp_path, matrix())
    assert "default-src 'none'" in html.replace("&#39;", "'")
    assert "unsafe" not in html
    assert re.findall(r'(?:src|href)="(?!#)[^"]*"', html) == []
    assert re.findall(r"(?:https?:)?//[\w.]+\.\w+", html) == []
    assert "url(" not in html
    assert re.findall(r'\sstyle="', html) == []


def test_ids_are_unique_and_links_lead_somewhere(tmp_path):
    html = page(tmp_path, matrix(), matrix(1.1))
    ids = re.findall(r'\sid="([^"]*)"', html)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'href="#([^"]*)"', html)) <= set(ids)
    assert set(re.findall(r'aria-labelledby="([^"]*)"', html)) <= set(ids)


@pytest.mark.parametrize(
    ("ratio", "kind"),
    [(1.0, "same"), (1.04, "same"), (0.96, "same"), (1.05, "slower1"), (0.6, "faster2"), (3, "slower3"),
     (0.2, "faster4"), (10, "slower5"), (0.01, "faster5")],
)  # fmt: skip
def test_colours_are_symmetric_around_one(ratio, kind):
    assert heat_class(ratio) == kind


def test_the_compiled_reference_is_a_row_and_every_row_is_told_over_it(tmp_path):
    used = [{"uuid": "GPU-1", "peak_allocated": 2**30, "energy_mj": 250_000.0, "utilization": 95}]
    rows = [
        cell("llm_decode", "local_pytorch", 0.8, gpu=used),
        cell("llm_decode", "local_compiled", 0.2, ratio=0.25, gpu=None),
        cell("llm_decode", "genie_full", 0.3, ratio=0.375),
    ]
    text = page(tmp_path, rows)
    assert "local_compiled (reference)" in text
    over = text[text.index("over that of local_compiled") :]
    over = over[: over.index("</table>")]
    assert "4.00" in over, "local_pytorch"
    assert "1.50" in over, "genie_full"
    assert "250 J" in text
    assert "1.00 GiB" in text
