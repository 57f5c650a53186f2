"""Writes the decision to the files that were asked for, after it was printed."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from genie.bench.gate.outcome import Outcome
from genie.errors import ConfigError

#: GitHub Actions shows what a step appends to this file
STEP_SUMMARY = "GITHUB_STEP_SUMMARY"


@dataclass(frozen=True)
class Destinations:
    """Files to write; None for those that nobody wants. ``step_summary`` is appended to."""

    json: Path | None = None
    junit: Path | None = None
    markdown: Path | None = None
    step_summary: Path | None = None

    def check(self) -> None:
        """Before anything is measured: raises ConfigError for a folder that is not there."""
        for path in (self.json, self.junit, self.markdown):
            if path is not None and not path.absolute().parent.is_dir():
                raise ConfigError(
                    f"cannot write {path}: there is no folder {path.absolute().parent}: make it first"
                )
            if path is not None and path.is_dir():
                raise ConfigError(f"cannot write {path}: it is a folder: give the path of a file")


def step_summary(environ: Mapping[str, str] = os.environ) -> Path | None:
    """Where this step of a GitHub workflow is summarized; None elsewhere."""
    path = environ.get(STEP_SUMMARY)
    return Path(path) if path else None


def write_outputs(outcome: Outcome, to: Destinations) -> list[str]:
    """Writes each file on its own. Returns why some could not be written, with their names."""
    problems = []
    for path, mode, content in _contents(outcome, to):
        try:
            with path.open(mode) as file:
                file.write(content())
        except OSError as error:
            problems.append(
                f"cannot write {path}: {error.strerror}: the decision above stands; "
                "free the disk or give another file, and run the gate again for the record"
            )
    return problems


def _contents(outcome: Outcome, to: Destinations) -> Iterator[tuple[Path, str, Callable[[], bytes]]]:
    from genie.bench.gate.junit import junit
    from genie.bench.gate.markdown import markdown

    if to.json is not None:
        yield to.json, "wb", lambda: json.dumps(outcome.as_dict(), indent=1, default=str).encode() + b"\n"
    if to.junit is not None:
        yield to.junit, "wb", lambda: junit(outcome)
    if to.markdown is not None:
        yield to.markdown, "wb", lambda: markdown(outcome).encode()
    if to.step_summary is not None:
        yield to.step_summary, "ab", lambda: markdown(outcome).encode()
