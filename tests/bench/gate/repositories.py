"""Real git repositories: small ones made from nothing, and clones of this project as it is now."""

from __future__ import annotations

import subprocess
from pathlib import Path

REPOSITORY = Path(__file__).parents[3]
AUTHOR = ("-c", "user.name=Tests", "-c", "user.email=tests@example.org", "-c", "commit.gpgsign=false")


def git(folder: Path, *arguments: str) -> str:
    command = ["git", *AUTHOR, *arguments]
    return subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True, timeout=60).stdout


def commit(folder: Path, tag: str, **files: str) -> str:
    """Commits ``files`` (content by path) on top of HEAD under ``tag``; returns the commit."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "--allow-empty", "-m", tag)
    git(folder, "tag", tag)
    return git(folder, "rev-parse", "HEAD").strip()


def small(folder: Path) -> Path:
    """A repository with a runtime, a harness and the wiring between them, in two commits: "first", HEAD."""
    folder.mkdir()
    git(folder, "init", "--quiet", "--initial-branch", "main")
    parts = {
        "genie/runtime.py": "runtime",
        "genie/bench/plugin.py": "harness",
        "genie/baselines/protocol.py": "harness",
        "genie/baselines/genie_remote.py": "wiring",
        "genie/errors.py": "harness",
        "bench_tests/test_cell.py": "harness",
    }
    commit(folder, "first", **{path: f"{what} of first" for path, what in parts.items()})
    commit(folder, "second", **{path: f"{what} of second" for path, what in parts.items()})
    return folder


def clone(folder: Path) -> Path:
    """This project with everything that is not committed yet, in a commit of its own."""
    git(folder.parent, "clone", "--quiet", "--shared", str(REPOSITORY), str(folder))
    for name in git(REPOSITORY, "ls-files", "-z", "--cached").split("\0"):
        if name and not (REPOSITORY / name).exists():
            (folder / name).unlink(missing_ok=True)
    for name in git(REPOSITORY, "ls-files", "-z", "--cached", "--others", "--exclude-standard").split("\0"):
        if name and (REPOSITORY / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes((REPOSITORY / name).read_bytes())
    commit(folder, "now")
    return folder
