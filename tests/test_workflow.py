"""The GitHub Actions workflow: what it runs exists, with these options, and finds what it needs."""

import argparse
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from genie import cli

REPOSITORY = Path(__file__).parents[1]
WORKFLOW = yaml.safe_load((REPOSITORY / ".github" / "workflows" / "benchmarks.yml").read_text())


def commands(job):
    """Command lines of a job's steps, split into words."""
    return [shlex.split(step["run"]) for step in WORKFLOW["jobs"][job]["steps"] if "run" in step]


def paths_kept(job):
    kept = [step["with"]["path"] for step in WORKFLOW["jobs"][job]["steps"] if "upload-artifact" in str(step)]
    return {path for paths in kept for path in paths.split()}


def test_the_matrix_job_collects_every_cell():
    (line,) = [words for words in commands("matrix") if words[0] == "pytest"]
    done = subprocess.run(
        [sys.executable, "-m", *line, "--collect-only", "-q"],
        cwd=REPOSITORY, capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "test_llm_decode[genie_full-no_residency]" in done.stdout


@pytest.mark.parametrize("job", ["matrix", "gate"])
def test_each_genie_command_takes_these_options(job):
    found = [words for words in commands(job) if words[0] == "genie"]
    assert found
    for _, name, *options in found:
        module = cli.importlib.import_module(cli.COMMANDS[name])
        parser = argparse.ArgumentParser(exit_on_error=False)
        module.add_arguments(parser)
        parser.parse_args(options)


def test_what_is_kept_is_what_the_jobs_write():
    written = {word for job in ("matrix", "gate") for words in commands(job) for word in words}
    assert paths_kept("matrix") == {"result.json", "report.html"}
    assert paths_kept("gate") == {"gate.xml", "gate.json", "gate.md"}
    assert paths_kept("matrix") | paths_kept("gate") <= written


def test_the_gate_job_has_the_history_and_the_head_of_the_pull_request():
    checkout = WORKFLOW["jobs"]["gate"]["steps"][0]["with"]
    assert checkout["fetch-depth"] == 0
    assert "head.sha" in checkout["ref"]
