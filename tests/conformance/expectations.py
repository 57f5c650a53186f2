"""`unsupported.toml` as objects, and the judgement of one op's report by it."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path

import torch
from packaging.version import Version

from tests.conformance.cases import OPS
from tests.conformance.checks import Report

NO_REFERENCE = "no-reference"


@dataclass(frozen=True)
class Expectation:
    """The one error with which all failures of an op must be raised."""

    category: str
    error: str = ""
    message: str = ""
    before: str = ""  # the torch version from which on the op passes


@dataclass(frozen=True)
class Deviation:
    ops: str
    what: str


_FILE = tomllib.loads(Path(__file__).with_name("unsupported.toml").read_text())
CATEGORIES: dict[str, str] = _FILE["categories"]
EXPECTED = {name: Expectation(**entry) for name, entry in _FILE["ops"].items()}
DEVIATIONS = [Deviation(**entry) for entry in _FILE["deviations"]]
#: those of this torch
UNSUPPORTED = {
    n: e
    for n, e in EXPECTED.items()
    if n in OPS and (not e.before or Version(torch.__version__).release < Version(e.before).release)
}


def complaints(name: str, report: Report) -> list[str]:
    """What is not as it should be; empty when the op passes, or fails exactly as `unsupported.toml` says."""
    found = [str(f) for f in report.wrong]
    expected = UNSUPPORTED.get(name)
    errors = [f for f in report.failures if f.kind == "error"]
    if expected is None:
        found += [str(f) for f in errors]
        if not report.compared and not found:
            found.append("no sample could be compared: the CPU refuses all of them")
    elif expected.category == NO_REFERENCE:
        if report.compared or errors:
            found.append("the CPU runs it: take it out of unsupported.toml's category no-reference")
    else:
        found += [
            f"{f}: unsupported.toml expects {expected.error}: {expected.message}"
            for f in errors
            if f.error != expected.error or expected.message not in f.message
        ]
        if not errors:
            found.append("it passes: take it out of unsupported.toml")
    return found
