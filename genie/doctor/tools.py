"""Programs outside of Python."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator

from genie.doctor.findings import Finding, Request, ok, warning


def check_git(request: Request) -> Iterator[Finding]:
    found = shutil.which("git")
    remedy = "install git: `genie gate --against` checks revisions out with it"
    if found is None:
        yield warning("git", "not on the PATH", remedy)
        return
    told = subprocess.run([found, "--version"], capture_output=True, text=True)
    if told.returncode:
        yield warning("git", f"{found} does not run: {told.stderr.strip()}", remedy)
    else:
        yield ok("git", f"{told.stdout.strip()}, {found}")
