"""``genie report``: a page or one line that says what to do; never half a page."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from genie.cli import main

from .stored import cell, document, write


@pytest.fixture
def stored(tmp_path):
    return write(tmp_path / "run.json", [cell("llm_decode", "local_pytorch"), cell("llm_decode", "ray")])


def failure(capsys, *args):
    assert main(["report", *map(str, args)]) == 2
    text = capsys.readouterr().err
    assert text.startswith("genie report: ")
    assert text.count("\n") == 1
    return text


def test_a_page_is_written_and_told(stored, tmp_path, capsys):
    output = tmp_path / "page.html"
    assert main(["report", str(stored), "-o", str(output)]) == 0
    assert output.read_text().startswith("<!doctype html>")
    assert capsys.readouterr().out.startswith(f"{output}: 1 run, ")


def test_the_default_output_is_report_html(stored, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["report", str(stored)]) == 0
    assert (tmp_path / "report.html").exists()


def test_a_file_given_twice_is_one_run(stored, tmp_path, capsys):
    assert main(["report", str(stored), str(stored), "-o", str(tmp_path / "page.html")]) == 0
    assert ": 1 run, " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ('{"benchmarks": [', "is not JSON"),
        ("[]", "no result of pytest-benchmark"),
        (json.dumps(document([])), "no cell of this suite"),
        (json.dumps(document([cell("llm_decode", "ray", schema_version=1)])), "schema version 1"),
        (json.dumps(document([cell("llm_decode", "ray", wire=[])])), "run the suite again"),
        (json.dumps(document([cell("llm_decode", "ray", float("nan"))])), "run the suite again"),
        (json.dumps(document([cell("llm_decode", "ray", ratio=0.0)])), "cannot be read"),
        (json.dumps(document([cell("llm_decode", "ray", fingerprint={})])), "run the suite again"),
        (
            json.dumps(document([cell("llm_decode", "ray")], genie={"ceiling": {}})),
            "the ceiling cannot be read",
        ),
    ],
)
def test_a_damaged_or_foreign_file_is_one_line(content, told, stored, tmp_path, capsys):
    bad = tmp_path / "bad.json"
    bad.write_text(content)
    output = tmp_path / "page.html"
    text = failure(capsys, stored, bad, "-o", output)
    assert told in text
    assert "bad.json" in text
    assert not output.exists()


def test_a_missing_file_is_one_line(tmp_path, capsys):
    assert "cannot read" in failure(capsys, tmp_path / "absent.json")


def test_a_full_disk_is_told(stored, capsys):
    assert "No space left on device" in failure(capsys, stored, "-o", "/dev/full")


def test_an_output_that_cannot_be_written_leaves_the_old_page(stored, tmp_path, capsys):
    """A write that fails halfway: this process may not make files over 4 KiB."""
    output = tmp_path / "page.html"
    output.write_text("the old page")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        text = failure(capsys, stored, "-o", output)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "cannot write" in text
    assert output.read_text() == "the old page"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["page.html", "run.json"]


def test_a_folder_that_is_not_there_is_told(stored, tmp_path, capsys):
    assert "cannot write" in failure(capsys, stored, "-o", tmp_path / "absent" / "page.html")


def test_a_folder_as_output_is_told(stored, tmp_path, capsys):
    assert "cannot write" in failure(capsys, stored, "-o", tmp_path)
    assert stored.exists()


def test_a_result_is_not_overwritten(stored, capsys):
    before = stored.read_bytes()
    assert "is one of the result files" in failure(capsys, stored, "-o", stored)
    assert stored.read_bytes() == before


def test_a_link_keeps_pointing_where_it_did(stored, tmp_path):
    target, link = tmp_path / "pages.html", tmp_path / "latest.html"
    target.write_text("old")
    link.symlink_to(target)
    assert main(["report", str(stored), "-o", str(link)]) == 0
    assert link.is_symlink()
    assert target.read_text().startswith("<!doctype html>")


def test_a_pipe_gets_the_page(stored, tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with ThreadPoolExecutor(1) as pool:
        page = pool.submit(pipe.read_text)
        assert main(["report", str(stored), "-o", str(pipe)]) == 0
        assert page.result(timeout=20).rstrip().endswith("</html>")


def test_the_options_load_nothing_heavy():
    code = "import sys, genie.bench.report.command; print({'torch', 'numpy', 'jinja2'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "set()"
