"""The two trees that a gate run measures: made by git, and left alone while the user goes on editing.

Both trees lie side by side in the cache folder and are laid out the same way. The new one is the
commit that is checked out (or, where that is allowed, the working tree as it is). The old one is a
*composite*: the runtime of the old revision under the harness of the new one, so that a change of
harness is not taken for a change of speed.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from genie.errors import CannotCompareError

#: What measures, taken from the new side for both: the harness and its cells, what a workload is, the
#: baselines and the processes of the peers, how a pool is started, the errors that these raise (the tree of
#: errors only grows, so an older runtime finds its own in it), the facts of fingerprints and what GPUs are
#: asked, and the display of uploads. Everything else under genie/ is what is measured and stays the
#: revision's own, with what it needs to describe itself: features (config.py), devices and their cores
#: (devices.py; a difference shows in the fingerprints), the command that starts a server (cli.py).
HARNESS = (
    "genie/bench",
    "genie/baselines",
    "genie/workloads",
    "genie/errors.py",
    "genie/device_facts.py",
    "genie/nvml.py",
    "genie/gpu_meter.py",
    "genie/launch",
    "genie/runtime/child_process.py",
    "genie/runtime/progress.py",
    "bench_tests",
    "conftest.py",
    "pytest.ini",
)
#: Exception: which executors a Genie baseline runs on, and how, is a decision of the runtime. With the
#: new wiring the old side would measure a choice that it never made, or fail to import an executor
#: that it does not have.
WIRING = "genie/baselines/genie_*.py"

_HOOK_VARIABLES = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_PREFIX")
#: of a list of changed files, this many are named
_NAMED = 8


@dataclass(frozen=True)
class Revision:
    """One side. ``name`` is how the user calls it; ``identity`` is equal only for equal content.

    ``tree`` is the folder to measure in; ``dirty`` where it holds changes that no commit has.
    """

    name: str
    commit: str
    tree: Path
    dirty: bool
    identity: str

    def __str__(self) -> str:
        commit = self.commit[:10]
        return (self.name if self.name == commit else f"{self.name} ({commit})") + " +dirty" * self.dirty


def repository_of(folder: Path) -> Path:
    """The working tree that ``folder`` is in. Raises CannotCompareError outside one, and without git."""
    return Path(_git(folder, "rev-parse", "--show-toplevel").strip())


def resolve(repository: Path, rev: str) -> str:
    """The commit that ``rev`` names, in full. Raises CannotCompareError when there is none."""
    try:
        return _git(
            repository, "rev-parse", "--verify", "--quiet", "--end-of-options", f"{rev}^{{commit}}"
        ).strip()
    except CannotCompareError:
        raise CannotCompareError(
            f"git knows no revision {rev!r} in {repository}: correct the name, or get it first "
            "(`git fetch`; in a shallow clone `git fetch --unshallow`)"
        ) from None


def changed_files(repository: Path) -> list[str]:
    """Tracked files with changes and untracked ones that are not ignored."""
    status = _git(repository, "status", "--porcelain", "-z", "--untracked-files=all", "--no-renames")
    return [entry[3:] for entry in status.split("\0") if entry]


@contextmanager
def prepare(
    rev: str | None, *, repository: Path, cache: Path, allow_dirty: bool = False, keep: bool = False
) -> Iterator[tuple[Revision, Revision]]:
    """``(old, new)``, their trees in ``cache`` until the end of the block (or for good, with ``keep``).

    ``rev`` None puts the new side's own content on both. Raises CannotCompareError for a revision
    that does not exist, for changes that are in no commit, and for what git cannot do.
    """
    commit = resolve(repository, "HEAD")
    old_commit = commit if rev is None else resolve(repository, rev)
    changes = changed_files(repository)
    if changes and not allow_dirty:
        raise CannotCompareError(
            f"the working tree has changes that are in no commit: {_some(changes)}: commit or stash them, "
            "or give --allow-dirty to measure the working tree as it is"
        )
    with _alone(cache), _removed_at_end(repository, cache / "old", cache / "new", keep=keep) as trees:
        old_tree, new_tree = trees
        try:
            _add_worktree(repository, new_tree, commit)
            _copy_changes(repository, new_tree, changes)
            identity = commit + (f"+{_digest(new_tree, changes)}" if changes else "")
            new = Revision("working tree" if changes else "HEAD", commit, new_tree, bool(changes), identity)
            _add_worktree(repository, old_tree, old_commit)
            if rev is None:
                _copy_changes(new_tree, old_tree, changes)
                old = replace(new, tree=old_tree)
            else:
                _put_harness(new_tree, old_tree)
                old = Revision(rev, old_commit, old_tree, False, old_commit)
        except OSError as error:
            raise CannotCompareError(
                f"cannot lay out the two revisions in {cache}: {error}: free the disk, or mend it"
            ) from error
        yield old, new


@contextmanager
def _alone(cache: Path) -> Iterator[None]:
    """One gate at a time in a repository; the kernel frees the lock whatever ends this process."""
    try:
        cache.mkdir(parents=True, exist_ok=True)
        # Git is told here, for the project's own .gitignore may be of another project, or of another time.
        (cache / ".gitignore").write_text("*\n", encoding="utf-8")
        lock = (cache / "lock").open("w")
    except OSError as error:
        raise CannotCompareError(
            f"cannot write {cache}: {error.strerror}: free the disk, or mend it"
        ) from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CannotCompareError(
                f"another gate runs in this repository (it holds {cache / 'lock'}): wait for its end"
            ) from None
        yield


@contextmanager
def _removed_at_end(repository: Path, *trees: Path, keep: bool) -> Iterator[tuple[Path, ...]]:
    """Without what an earlier run left there, too."""
    _remove(repository, *trees)
    try:
        yield trees
    finally:
        if not keep:
            _remove(repository, *trees)


def _add_worktree(repository: Path, tree: Path, commit: str) -> None:
    _git(repository, "worktree", "add", "--detach", "--quiet", "--force", str(tree), commit)


def _put_harness(source: Path, tree: Path) -> None:
    """Replaces the harness in ``tree`` by that of ``source``, and leaves the runtime's wiring."""
    wiring = {path.relative_to(tree): path.read_bytes() for path in tree.glob(WIRING)}
    for part in HARNESS:
        _delete(tree / part)
        if (source / part).is_dir():
            shutil.copytree(source / part, tree / part, ignore=shutil.ignore_patterns("__pycache__"))
        elif (source / part).exists():
            (tree / part).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source / part, tree / part)
    if wiring:
        for path in tree.glob(WIRING):
            path.unlink()
        for relative, content in wiring.items():
            (tree / relative).write_bytes(content)


def _copy_changes(source: Path, tree: Path, changes: list[str]) -> None:
    """Makes the files named by ``changes`` in ``tree`` what they are in ``source``."""
    for name in changes:
        if not os.path.lexists(source / name):
            _delete(tree / name)
            continue
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(source / name, tree / name, follow_symlinks=False)


def _digest(tree: Path, changes: list[str]) -> str:
    """Over names and content of the changed files; a file that was deleted has none."""
    state = hashlib.sha256()
    for name in sorted(changes):
        content = (tree / name).read_bytes() if (tree / name).is_file() else b""
        state.update(f"{name}\0{len(content)}\0".encode() + content)
    return state.hexdigest()[:16]


def _remove(repository: Path, *trees: Path) -> None:
    for tree in trees:
        shutil.rmtree(tree, ignore_errors=True)
    _git(repository, "worktree", "prune")


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _git(folder: Path, *arguments: str) -> str:
    # Set inside a git hook, and then meant for another folder than this one.
    environ = {name: value for name, value in os.environ.items() if name not in _HOOK_VARIABLES}
    try:
        done = subprocess.run(
            ["git", *arguments],
            cwd=folder,
            env=environ,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
    except FileNotFoundError:
        raise CannotCompareError(
            "git was not found: install it, or use --stored to compare result files"
        ) from None
    if done.returncode:
        told = done.stderr.strip() or done.stdout.strip() or "no message"
        raise CannotCompareError(f"git {arguments[0]} failed in {folder}: {told}")
    return done.stdout


def _some(names: list[str]) -> str:
    more = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {more} more" if more > 0 else "")
