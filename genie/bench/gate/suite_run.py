"""The suite measured in a fresh process with the options of a stored run."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Collection
from pathlib import Path

from genie.bench.gate.process import ended_by_sigterm
from genie.bench.options import ABLATE_EACH, ROWS
from genie.bench.results import Result, load_result
from genie.errors import CannotCompareError

#: pytest has this long to close its servers after an interruption, in seconds
_CLOSING_S = 30.0
#: exit status of pytest: all passed; some failed (what was measured is saved all the same)
_MEASURED = (0, 1)
#: the one whose features can be switched off
ABLATED_BASELINE = "genie_full"
_BESIDE = {"link", "client_cost"}


def measure_like(stored: Result, out: Path, cells: Collection[str] | None = None) -> Result:
    """One run of the suite here and now, written to ``out``; only ``cells`` where ids are given.

    The run's own output goes to stderr. Raises CannotCompareError when it measures nothing.
    """
    command = [sys.executable, "-m", "pytest", *suite_arguments(stored, cells), "--benchmark-json", str(out)]
    # A session of its own: Ctrl-C reaches this process alone, which passes it on once.
    with ended_by_sigterm(), subprocess.Popen(command, stdout=sys.stderr, start_new_session=True) as process:
        try:
            status = process.wait()
        except BaseException:
            _close(process)
            raise
    if status not in _MEASURED or not out.exists() or not out.stat().st_size:
        raise CannotCompareError(
            f"the suite measured nothing (pytest ended with {status}; its output is above): run this in the "
            f"folder that holds {', '.join(_folders(stored))}, or measure by hand and give --current"
        )
    return load_result(out)


def suite_arguments(stored: Result, cells: Collection[str] | None) -> list[str]:
    """pytest's arguments for the same cells under the same options as ``stored``."""
    # Those beside the matrix have rounds of their own.
    infos = [cell.info for cell in stored.cells.values() if not _BESIDE & cell.info.keys()]
    infos = infos or [cell.info for cell in stored.cells.values()]
    devices = max((info["fingerprint"].get("devices") or () for info in infos), key=len)
    rounds = max(int(info["rounds"]) for info in infos)
    names = {info["baseline"] for info in infos}
    sources = {info["weights"]["source"] for info in infos} - {None}
    arguments = [
        *(cells if cells is not None else _folders(stored)),
        "--benchmark-only",
        "--genie-profile", infos[0]["profile"],
        "--genie-baselines", ",".join(name for name in ROWS if name in names),
        "--genie-rounds", str(rounds),
        "--genie-weights", "pretrained" if "pretrained" in sources else "seeded",
    ]  # fmt: skip
    if devices:
        arguments += ["--genie-device", devices[0]["type"], "--genie-servers", str(len(devices))]
    ablated = _ablated(
        {tuple(info.get("ablated") or ()) for info in infos if info["baseline"] == ABLATED_BASELINE}
    )
    if ablated:
        arguments += ["--genie-ablate", ablated]
    return arguments


def _ablated(rows: Collection[tuple[str, ...]]) -> str:
    """The value of ``--genie-ablate`` that made these rows (what is switched off in each); "" for none."""
    if len(rows) > 1:
        return ABLATE_EACH
    return ",".join(name for row in rows for name in row)


def _folders(stored: Result) -> list[str]:
    """Of the files that the cells are in, relative to the repository's root (pytest's node ids)."""
    files = dict.fromkeys(cell.partition("::")[0] for cell in stored.cells)
    return list(dict.fromkeys(str(Path(file).parent) for file in files))


def _close(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGINT)
    try:
        process.wait(_CLOSING_S)
    except subprocess.TimeoutExpired:
        process.kill()
