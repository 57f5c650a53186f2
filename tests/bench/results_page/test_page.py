# ruff: noqa: RUF001
"""``genie results``: what the files say, in tables, and what genie_full loses."""

from __future__ import annotations

import json

import pytest

from genie.bench.floors import floor_of, steps_of
from genie.bench.limits import limits_of
from genie.cli import main
from tests.bench.report.stored import cell, document, matrix

XL = {"name": "gpt2-xl", "params": 1, "dtype": "float16"}
H100 = "NVIDIA H100 80GB HBM3"
DEVICE = {"type": "cuda", "model": H100, "cores": 16, "torch": "2", "driver": "580", "max_sm_mhz": 1980}
CLIENT = {
    "cpu_model": "A CPU",
    "cores": 16,
    "machine": "x86_64",
    "python": "3.12",
    "libraries": {"torch": "2"},
}
STATE = {
    "name": H100,
    "driver": "580",
    "sm_mhz": 1755,
    "memory_mhz": 2619,
    "power_limit_w": 700.0,
    "slowed_by": [],
}
FINGERPRINT = {"client": CLIENT, "devices": [DEVICE], "gpus": [STATE], "gpus_why": None}
MIB = 2**20


def decode(baseline, median_s, tpot_ms, **more):
    llm = {"ttft_ms": 20.0, "tpot_ms": tpot_ms, "tokens": 128, "observed_at": "client"}
    return cell(
        "llm_decode", baseline, median_s, profile="gpu", model=XL, llm=llm, fingerprint=FINGERPRINT,
        schema_version=3, **more,
    )  # fmt: skip


def gpu(energy_mj, peak):
    one = {"uuid": "GPU-1", "peak_allocated": peak, "energy_mj": energy_mj, "utilization": 95}
    return [one | {"sm_mhz": 1755, "slowed_by": []}]


RUN = [
    decode("local_pytorch", 4.0, 30.0, gpu=gpu(800_000, 3100 * MIB)),
    decode("local_compiled", 0.5, 3.75, gpu=gpu(200_000, 3200 * MIB)),
    decode(
        "genie_full", 0.6, 4.5, gpu=gpu(250_000, 3300 * MIB),
        receipts=[{"counters": {"engine_graph": 100, "rewritten": 3}}, {"counters": {"engine_graph": 27}}],
    ),
    decode("pytorch_rpc", 4.4, 33.0, gpu=None),
]  # fmt: skip


def page(tmp_path, *documents, title=()):
    paths = []
    for number, one in enumerate(documents):
        paths.append(tmp_path / f"run{number}.json")
        paths[-1].write_text(json.dumps(one))
    output = tmp_path / "page.md"
    assert main(["results", *map(str, paths), "-o", str(output), *title]) == 0
    return output.read_text()


def row(text, label, after):
    """Cells of the row ``label`` of the first table below the line that holds ``after``."""
    below = text[text.index(after) :]
    line = next(line for line in below.splitlines() if line.startswith(f"| `{label}`"))
    return [part.strip() for part in line.strip("|").split("|")]


@pytest.fixture
def text(tmp_path):
    return page(tmp_path, document(RUN))


def test_a_cell_has_its_ratios_to_both_local_rows(text):
    assert row(text, "genie_full", "### llm_decode")[1:5:2] == ["600 ms", "0.15×"]
    assert row(text, "genie_full", "### llm_decode")[4] == "1.20×"
    assert row(text, "local_pytorch", "### llm_decode")[3:5] == ["1.00×", "8.00×"]


def test_the_fraction_of_the_limit_follows_from_sizes_and_the_stated_bandwidth(text):
    steps = steps_of(RUN[0]["extra_info"])
    limits = limits_of([], H100, "float16")
    each = [floor_of((step,), limits).seconds for step in steps[1:]]
    whole = floor_of(steps, limits).seconds
    assert row(text, "local_compiled", "### llm_decode")[5] == f"{100 * whole / 0.5:.3g} % m"
    assert row(text, "genie_full", "| row | TTFT")[5] == f"{100 * sum(each) / len(each) / 4.5e-3:.3g} % m"
    assert "limits of a device in float16: 989 TFLOP/s, 3.35e+03 GB/s; stated in NVIDIA's data sheet" in text


def test_limits_measured_in_the_run_come_before_stated_ones(tmp_path):
    measured = {
        "model": H100,
        "dtype": "float16",
        "flops_per_s": 6e14,
        "bytes_per_s": 3e12,
        "how": "torch.mm",
    }
    text = page(tmp_path, document(RUN, genie={"limits": [measured]}))
    assert "600 TFLOP/s, 3e+03 GB/s; measured in the run (torch.mm)" in text


def test_tokens_are_told_with_their_ratios(text):
    assert row(text, "genie_full", "| row | TTFT")[1:5] == ["20.0 ms", "4.50 ms", "0.15×", "1.20×"]


def test_memory_and_energy_are_those_of_the_gpus_and_absent_for_the_peers(text):
    assert row(text, "genie_full", "### llm_decode")[-2:] == ["3.22 GiB", "250 J"]
    assert row(text, "pytorch_rpc", "### llm_decode")[-2:] == ["n/a", "n/a"]


def test_engine_counters_are_summed_over_the_receipts(text):
    assert row(text, "llm_decode", "### Engines") == [
        "`llm_decode`",
        "`genie_full`",
        *"127 0 0 3 0 0".split(),
    ]


def test_the_machine_and_its_gpus_are_told(text):
    assert f"devices: 1 × {H100}" in text
    assert f"{H100}, driver 580, 1755 SM MHz, 2619 memory MHz, 700 W limit, not slowed" in text


def test_every_loss_is_listed_the_largest_first_and_no_win(tmp_path):
    slow = [decode("genie_full", 5.0, 40.0), *[one for one in RUN if "genie_full" not in one["name"]]]
    listed = page(tmp_path, document(slow)).split("### Where Genie loses")[1].split("###")[0]
    lines = [line for line in listed.splitlines() if line.startswith("- ")]
    assert lines == [
        "- `llm_decode`: 10.0× of `local_compiled` (5.00 s on 1 device, against 500 ms on 1 device)",
        "- `llm_decode`: 1.25× of `local_pytorch` (5.00 s on 1 device, against 4.00 s on 1 device)",
        "- `llm_decode`: 1.14× of `pytorch_rpc` (5.00 s on 1 device, against 4.40 s on 1 device)",
        "- `llm_decode`: not compared with what this run lacks: ray.",
    ]


def test_a_run_without_losses_says_so(tmp_path):
    fast = [decode("genie_full", 0.1, 1.0), *RUN[:2]]
    assert "in no cell of this run is `genie_full` slower than `local_pytorch`," in page(
        tmp_path, document(fast)
    )


def test_the_whole_matrix_of_older_files_is_readable_and_each_file_is_a_section(tmp_path):
    text = page(tmp_path, document(matrix()), document(RUN, hour=1), title=("--title", "One H100"))
    assert text.startswith("# One H100\n")
    assert text.index("## run0.json") < text.index("## run1.json")
    first = text[: text.index("## run1.json")]
    assert first.count("\n### ") == 1 + 5, "the losses, and the workloads"
    assert all(len(row(first, "ray", f"### {name}")) == 12 for name in ("vision_cnn", "microbenchmark"))


def test_an_ablated_row_is_none_that_loses(tmp_path):
    rows = [RUN[0], decode("genie_full", 9.0, 70.0, ablated=("residency",))]
    listed = page(tmp_path, document(rows)).split("### Where Genie loses")[1]
    assert "9.00 s on" not in listed.split("###")[0]
    assert "`genie_full` is not in this run" in listed


def test_a_result_is_not_overwritten_by_its_page(tmp_path, capsys):
    path = tmp_path / "run.json"
    path.write_text(json.dumps(document(RUN)))
    assert main(["results", str(path), "-o", str(path)]) == 2
    assert "give the page another name" in capsys.readouterr().err
