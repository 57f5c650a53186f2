"""The interpreter that a revision runs with: this one, or one with the revision's own dependencies.

The current environment serves every revision with the same dependencies and constraints. For others a
virtual environment is made once per set of dependencies, and found again by its name the next time.
Only dependencies are installed: the revision's code comes from its tree (see genie.bench.gate.process).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from genie.errors import CannotCompareError

#: lines of pip's output that an error shows
_TAIL = 20
_COMPLETE = "complete"


@dataclass(frozen=True)
class Dependencies:
    """What a tree asks for: requirements as pyproject.toml writes them, and pins by package name."""

    requires: tuple[str, ...]
    pins: tuple[str, ...]

    @property
    def key(self) -> str:
        """Equal for equal dependencies under this interpreter; used as a folder's name."""
        raw = json.dumps([self.requires, self.pins, sys.version_info[:3], sys.prefix])
        return hashlib.sha256(raw.encode()).hexdigest()[:16]


def dependencies_of(tree: Path) -> Dependencies:
    """Of the project in ``tree``; pins of what only its tests need are left out, for they run nothing here.

    None where there is no pyproject.toml, as in another project that only uses the suite.
    Raises CannotCompareError where it is damaged.
    """
    if not (tree / "pyproject.toml").exists():
        return Dependencies((), ())
    try:
        project = tomllib.loads((tree / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        requires = tuple(sorted(project.get("dependencies", ())))
        extras = project.get("optional-dependencies", {})
        constraints = tree / "constraints.txt"
        lines = constraints.read_text(encoding="utf-8").splitlines() if constraints.exists() else []
    except (OSError, KeyError, ValueError) as error:
        raise CannotCompareError(
            f"cannot read the dependencies of {tree.name} in pyproject.toml and constraints.txt: {error}: "
            "compare with a revision that can be installed"
        ) from None
    needed = {_name(one) for one in requires}
    for_tests = {_name(one) for extra in extras.values() for one in extra} - needed
    pins = {line.partition("#")[0].strip() for line in lines} - {""}
    return Dependencies(requires, tuple(sorted(pin for pin in pins if _name(pin) not in for_tests)))


def python_for(old: Path, new: Path, cache: Path, tell: Callable[[str], None]) -> Path:
    """The interpreter for the tree ``old``, when the current one is that of ``new``.

    What the harness of ``new`` needs and ``old`` does not name is installed beside the latter's own.
    Raises CannotCompareError with the end of pip's output.
    """
    theirs, ours = dependencies_of(old), dependencies_of(new)
    if theirs == ours:
        return Path(sys.executable)
    merged = Dependencies(
        _with_missing(theirs.requires, ours.requires), _with_missing(theirs.pins, ours.pins)
    )
    folder = cache / "environments" / merged.key
    python = folder / "bin" / "python"
    if (folder / _COMPLETE).exists():
        tell(f"the old revision has other dependencies: its environment {folder} is used again")
        return python
    tell(f"the old revision has other dependencies: they are installed in {folder} (once)")
    shutil.rmtree(folder, ignore_errors=True)
    try:
        folder.mkdir(parents=True)
        (folder / "constraints.txt").write_text("\n".join(merged.pins) + "\n", encoding="utf-8")
        (folder / "requirements.txt").write_text("\n".join(merged.requires) + "\n", encoding="utf-8")
    except OSError as error:
        raise CannotCompareError(
            f"cannot write {folder}: {error.strerror}: free the disk and try again"
        ) from None
    _run([sys.executable, "-m", "venv", "--without-pip", str(folder)])
    _run(
        [
            sys.executable, "-m", "pip", "--python", str(python), "install", "--no-input",
            "--disable-pip-version-check", "-c", str(folder / "constraints.txt"),
            "-r", str(folder / "requirements.txt"),
        ]
    )  # fmt: skip
    (folder / _COMPLETE).touch()
    return python


def _with_missing(mine: Sequence[str], others: Sequence[str]) -> tuple[str, ...]:
    names = {_name(one) for one in mine}
    return tuple(sorted([*mine, *(one for one in others if _name(one) not in names)]))


def _name(requirement: str) -> str:
    """The package that a requirement or a pin is about, normalized (PEP 503)."""
    found = re.match(r"[A-Za-z0-9._-]+", requirement.strip())
    return re.sub(r"[-_.]+", "-", found.group().lower()) if found else requirement


def _run(command: list[str]) -> None:
    # Without PYTHONPATH: what lies there must not be taken for an installed dependency.
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environ,
    )
    if done.returncode:
        tail = "\n".join(done.stdout.splitlines()[-_TAIL:])
        raise CannotCompareError(
            f"the dependencies of the old revision cannot be installed ({' '.join(command[1:4])} ended with "
            f"{done.returncode}): compare with a revision that installs here, or mend what pip says:\n{tail}"
        )
