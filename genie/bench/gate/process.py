"""Measuring processes: pytest on a tree, with servers of its own, and the proof of what it imported.

The tree comes first on PYTHONPATH, before an editable install, for the client and (who inherit it) for
its servers. That this worked is checked after each run: every process of it that imported ``genie``
wrote down from where, and none could take a part of it from elsewhere (see witness/sitecustomize.py).
"""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import FrameType

import psutil

from genie.bench.gate.turns import VARIABLE as TURNS_VARIABLE
from genie.bench.gate.turns import Turns
from genie.bench.results import Result, load_result
from genie.errors import CannotCompareError, ResultError
from genie.runtime.child_process import die_with_parent

WITNESS_VARIABLE = "GENIE_GATE_WITNESS"
_RESULT = "result.json"
#: plugins of pytest that a run needs; others in the environment stay out, on both sides alike
PLUGINS = ("pytest_benchmark.plugin", "xdist.plugin", "genie.bench.plugin", "genie.bench.gate.turns")
#: pytest's exit status when all cells passed, and when some failed: what was measured is saved
_MEASURED = (0, 1)
#: lines of output that an error shows
_TAIL = 25
#: servers have this long to notice that their client is gone, in seconds
_GONE_S = 8.0
#: with less than this free on the disk, a result that was not written is explained by it
_FULL_BYTES = 1 << 20


@dataclass(frozen=True)
class Side:
    """What a process measures: a tree, the interpreter for it, and pytest plugins of its own.

    ``name`` is for messages; ``label`` ("old", "new", "a", "b") is part of file names.
    """

    label: str
    name: str
    tree: Path
    python: Path = Path(sys.executable)
    arguments: tuple[str, ...] = ()


def measure(runs: Sequence[tuple[Side, Path]], arguments: Sequence[str], mirrored: bool) -> list[Result]:
    """Runs pytest with ``arguments`` on every side at once, taking turns (see genie.bench.gate.turns).

    Each result lies at its path afterwards, whole, once all sides have one; the output lies beside it, with
    the suffix .log. With ``mirrored`` the last side is the first to have a turn. Ends all processes of the
    runs, whatever ends it. Raises CannotCompareError for a side without a result, with the end of its output.
    """
    folder = runs[0][1].parent
    scratches = [out.parent / f"running-{side.label}" for side, out in runs]
    try:
        with Turns(len(runs), mirrored) as turns, ExitStack() as stack:
            started = []
            for rank, ((side, out), scratch) in enumerate(zip(runs, scratches, strict=True)):
                shutil.rmtree(scratch, ignore_errors=True)
                (scratch / "witness").mkdir(parents=True)
                output = stack.enter_context(out.with_suffix(".log").open("wb")).fileno()
                process = _start(side, arguments, scratch, output, turns.address(rank))
                stack.callback(_end, process, scratch / "witness")
                started.append(process)
            turns.serve(lambda: sum(process.poll() is None for process in started))
        statuses = [process.returncode for process in started]
        measured = [
            _result(side, status, scratch, out)
            for (side, out), status, scratch in zip(runs, statuses, scratches, strict=True)
        ]
        for (_, out), scratch in zip(runs, scratches, strict=True):
            os.replace(scratch / _RESULT, out)
        return measured
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise _full(folder) from error
        raise CannotCompareError(
            f"cannot write to {folder}: {error}: mend it and go on with --resume"
        ) from error
    finally:
        for scratch in scratches:
            shutil.rmtree(scratch, ignore_errors=True)


def _result(side: Side, status: int, scratch: Path, out: Path) -> Result:
    """What one side measured, checked; it will lie at ``out``."""
    result, log = scratch / _RESULT, out.with_suffix(".log")
    if status not in _MEASURED or not result.exists() or not result.stat().st_size:
        raise _no_result(side, status, log, out)
    try:
        measured = load_result(result)
    except ResultError as error:
        if _is_full(out.parent):
            raise _full(out.parent) from None
        raise CannotCompareError(f"{side.name}: its result cannot be read: {error}\n{_tail(log)}") from None
    _check_imports(side, scratch / "witness", measured)
    return replace(measured, path=out)


@contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """SIGTERM (a cancelled CI job, ``timeout``) is KeyboardInterrupt in the block, in the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _command(side: Side, arguments: Sequence[str], scratch: Path) -> list[str]:
    plugins = [part for plugin in PLUGINS for part in ("-p", plugin)]
    return [
        str(side.python), "-m", "pytest", "-q", "-p", "no:cacheprovider", *plugins, *arguments,
        *side.arguments, "--benchmark-only", "--benchmark-json", str(scratch / _RESULT),
        "--basetemp", str(scratch / "tmp"),
    ]  # fmt: skip


def _start(
    side: Side, arguments: Sequence[str], scratch: Path, output: int, turns: str
) -> subprocess.Popen[bytes]:
    environ = {
        name: value for name, value in os.environ.items() if name not in ("PYTEST_ADDOPTS", "PYTEST_PLUGINS")
    }
    paths = [str(side.tree), str(_witness_folder(side.tree))]
    inherited = environ.get("PYTHONPATH")
    environ |= {
        "PYTHONPATH": os.pathsep.join([*paths, *([inherited] if inherited else [])]),
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        WITNESS_VARIABLE: str(scratch / "witness"),
        TURNS_VARIABLE: turns,
    }
    # A session of its own: Ctrl-C reaches the gate alone, which ends the run as a whole.
    return subprocess.Popen(
        _command(side, arguments, scratch), cwd=side.tree, env=environ, stdin=subprocess.DEVNULL,
        stdout=output, stderr=output, start_new_session=True,
        preexec_fn=partial(die_with_parent, os.getpid()),
    )  # fmt: skip


def _end(process: subprocess.Popen[bytes], witness: Path) -> None:
    """Nothing of the run is left: not pytest, nor its servers, which are in sessions of their own."""
    with suppress(ProcessLookupError):  # nobody of its group is left
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    ours = [found for pid in _witnesses(witness) if (found := _process_of(pid, witness)) is not None]
    _, left = psutil.wait_procs(ours, timeout=_GONE_S)
    for one in left:
        with suppress(psutil.NoSuchProcess):
            one.kill()
    psutil.wait_procs(left, timeout=_GONE_S)


def _process_of(pid: int, witness: Path) -> psutil.Process | None:
    """The live process with ``pid``, if it is of this run and not a later owner of the number."""
    try:
        process = psutil.Process(pid)
        return process if process.environ().get(WITNESS_VARIABLE) == str(witness) else None
    except psutil.Error:
        return None


def _witnesses(witness: Path) -> dict[int, str]:
    """By pid, the file of the package ``genie`` that the process imported."""
    return {int(record.name): record.read_text(encoding="utf-8") for record in witness.iterdir()}


def has_runtime(tree: Path) -> bool:
    """Whether the tree is of Genie itself; another project's tree only uses the suite that is installed."""
    return (tree / "genie").exists()


def _witness_folder(tree: Path) -> Path:
    own = Path(__file__).parent / "witness"
    return tree / "genie" / "bench" / "gate" / "witness" if has_runtime(tree) else own


def _check_imports(side: Side, witness: Path, measured: Result) -> None:
    """Raises CannotCompareError unless the client and every server with a receipt ran this tree's code.

    In another project's tree: unless they all ran one and the same installed suite.
    """
    imported = _witnesses(witness)
    installed = min(imported.values(), default="")
    expected = str(side.tree / "genie" / "__init__.py") if has_runtime(side.tree) else installed
    for pid, file in imported.items():
        if Path(file).resolve() != Path(expected).resolve():
            raise CannotCompareError(
                f"{side.name}: process {pid} imported genie from {file}, not from {expected}: take that "
                "folder off PYTHONPATH, or uninstall the package that brings it"
            )
    receipts = [receipt for cell in measured.cells.values() for receipt in cell.info.get("receipts") or ()]
    unseen = {receipt["pid"] for receipt in receipts} - imported.keys()
    if unseen or not imported:
        which = f"process {min(unseen)}" if unseen else "it"
        raise CannotCompareError(
            f"{side.name}: nothing tells which code {which} ran: the "
            "interpreter did not run this suite's sitecustomize; take another one off PYTHONPATH"
        )


def _no_result(side: Side, status: int, log: Path, out: Path) -> CannotCompareError:
    if _is_full(out.parent) or os.strerror(errno.ENOSPC) in _tail(log):
        return _full(out.parent)
    how = f"was ended by signal {-status}" if status < 0 else f"exited with {status}"
    return CannotCompareError(
        f"{side.name} does not build or run under the current harness (pytest {how}): mend it, or compare "
        f"with a revision whose runtime has what the harness uses. The end of its output:\n{_tail(log)}"
    )


def _is_full(folder: Path) -> bool:
    return shutil.disk_usage(folder).free < _FULL_BYTES


def _full(folder: Path) -> CannotCompareError:
    return CannotCompareError(
        f"the disk that holds {folder} is full: free some of it and go on with --resume "
        "(finished processes are kept)"
    )


def _tail(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    return "\n".join(lines[-_TAIL:])
