"""What the gate leaves behind: JUnit for CI, the record as JSON, Markdown for a pull request."""

import io
import json
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest

from genie.bench.gate.decision import Settings
from genie.bench.gate.outcome import Outcome
from genie.bench.gate.outputs import Destinations, step_summary, write_outputs
from genie.bench.gate.terminal import print_outcome
from genie.errors import ConfigError
from tests.bench.gate.inputs import FINGERPRINT, cell_id
from tests.bench.gate.test_outcome import gate, pairs


@pytest.fixture(scope="module")
def slower():
    """genie_full is slower and sends more; ray is gone."""
    first = pairs(1.2, wire={"bytes_in": 1500}, receipts=[{"counters": {"stateless": 7}}])
    for pair in first:
        ray = replace(pair.old.cells[cell_id("genie_full")], id=cell_id("ray"), label="ray")
        pair.old.cells[ray.id] = ray
    return gate(first, pairs(1.2, seed=1))[0]


def written(outcome, tmp_path, name):
    to = Destinations(**{name: tmp_path / name})
    assert write_outputs(outcome, to) == []
    return (tmp_path / name).read_text()


def test_junit_has_a_case_per_cell_and_a_failure_per_finding(slower, tmp_path):
    suite = ElementTree.fromstring(written(slower, tmp_path, "junit")).find("testsuite")
    assert (suite.get("tests"), suite.get("failures"), suite.get("errors")) == ("3", "2", "0")
    cases = {case.get("name"): case.find("failure") for case in suite.iter("testcase")}
    assert cases["local_pytorch"] is None
    assert cases["genie_full"].get("type") == "regression, counters changed"
    assert "bytes_in 1000 -> 1500" in cases["genie_full"].text
    assert "--accept-counters" in cases["genie_full"].text
    assert cases["ray"].get("type") == "missing"


def test_junit_survives_what_xml_cannot_write(tmp_path):
    text = written(Outcome("stored", Settings(), error="\x1b[31mred\x00 <&>"), tmp_path, "junit")
    error = ElementTree.fromstring(text).find("testsuite/testcase/error")
    assert error.get("message") == "?[31mred? <&>"


def test_json_is_the_complete_record(slower, tmp_path):
    record = json.loads(written(slower, tmp_path, "json"))
    assert (record["schema_version"], record["kind"]) == (1, "genie gate")
    assert (record["exit_code"], record["outcome"]) == (4, "missing_cells")
    assert record["findings"] == ["counters_changed", "missing_cells", "regression"]
    assert record["settings"] == {"floor": 0.05, "alpha": 0.1, "accept_counters": False}
    assert record["fingerprint"] == FINGERPRINT
    full = next(found for found in record["cells"] if found["id"] == cell_id("genie_full"))
    assert full["verdict"] == "slower"
    assert full["first"]["samples"] == full["again"]["samples"] == 6
    assert full["again"]["p_slower"] <= 0.05 < full["again"]["lower"]
    assert {"counter": "bytes_in", "old": [1000], "new": [1500]} in full["changes"]
    assert {"counter": "stateless", "old": 1, "new": 7} in full["shown"]


def test_markdown_tells_what_changed_first_and_folds_the_rest(slower, tmp_path):
    text = written(slower, tmp_path, "markdown")
    head, _, folded = text.partition("<details>")
    assert head.startswith("## Genie gate: **missing cells**")
    assert "3 cells: 1 missing, 1 slower, 1 with changed counters" in head.replace("\\", "")
    assert head.index("| decode: ray |") < head.index("| decode: genie\\_full |")
    assert "bytes\\_in 1000 -&gt; 1500" in head
    assert "local" not in head, "what did not change is folded away"
    assert "local\\_pytorch" in folded
    assert "| decode | genie\\_full | stateless | 1 | 7 |" in folded
    assert "a CPU" in folded
    assert text.count("<details>") == text.count("</details>") == 3


def test_markdown_of_a_pass_is_short(tmp_path):
    text = written(gate(pairs(1.0))[0], tmp_path, "markdown")
    assert text.startswith("## Genie gate: passed\n\n2 cells: 2 not slower\n\n")
    assert "|" not in text.partition("<details>")[0]


def test_a_pass_that_noise_made_says_so(tmp_path):
    noisy = gate(pairs(0.5, 2.0))[0]
    assert noisy.exit_code == 0
    assert [found.id for found in noisy.blind] == [cell_id("genie_full")]
    file = io.StringIO()
    print_outcome(noisy, file)
    for text in (file.getvalue(), written(noisy, tmp_path, "markdown")):
        assert "Too noisy to tell: 1 of 2 cells" in text
    assert "Too noisy" not in written(gate(pairs(1.0))[0], tmp_path, "markdown")


def test_the_step_summary_is_appended_to(slower, tmp_path):
    summary = tmp_path / "summary.md"
    summary.write_text("# Before\n")
    to = Destinations(step_summary=step_summary({"GITHUB_STEP_SUMMARY": str(summary)}))
    assert write_outputs(slower, to) == []
    assert summary.read_text().startswith("# Before\n## Genie gate: ")
    assert step_summary({}) is None


def test_the_terminal_shows_every_cell_and_the_remedy(slower):
    file = io.StringIO()
    print_outcome(slower, file)
    text = file.getvalue()
    assert all(label in text for label in ("local_pytorch", "genie_full", "ray"))
    assert "slower + counters" in text
    assert "run the gate with --accept-counters" in text
    assert text.splitlines()[-1].startswith("MISSING CELLS (exit 4): 3 cells: 1 missing, 1 slower")


def test_a_full_disk_names_the_file_and_the_others_are_written(slower, tmp_path):
    to = Destinations(json=Path("/dev/full"), junit=tmp_path / "junit.xml")
    (problem,) = write_outputs(slower, to)
    assert problem.startswith("cannot write /dev/full: No space left on device")
    assert (tmp_path / "junit.xml").stat().st_size


def test_a_missing_folder_is_told_before_anything_is_measured(tmp_path):
    with pytest.raises(ConfigError, match=r"there is no folder .*absent: make it first"):
        Destinations(json=tmp_path / "absent" / "out.json").check()
    with pytest.raises(ConfigError, match="it is a folder"):
        Destinations(junit=tmp_path).check()
