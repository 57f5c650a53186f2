"""``genie calibrate``: measures devices for the cost model, and says how good its predictions are."""

from __future__ import annotations

import argparse
import os
import secrets
import tempfile
import time
from pathlib import Path
from typing import Any

from genie.errors import ConfigError

HELP = "measure devices for the scheduler's cost model, and store what was measured"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--address", metavar="HOST:PORT,...", help="running servers (default: one is started on this host)")
    add("--token-file", help="file that holds their token (default: the variable GENIE_TOKEN)")
    add("--tls-ca", help="certificate authority of their certificates, PEM")
    add("--device", default="auto", help="of the server that is started: cpu, cuda or auto (default)")
    add("--force", action="store_true", help="measure again what is stored already")


def run(args: argparse.Namespace) -> int:
    if not args.address:
        return _on_own_server(args)
    addresses = [a.strip() for a in args.address.split(",") if a.strip()]
    if not addresses:
        raise ConfigError("--address names no server: write HOST:PORT, or leave it out")
    _calibrate(addresses, _token(args), args)
    return 0


def _token(args: argparse.Namespace) -> str | None:
    """None: that of the environment."""
    if not args.token_file:
        return None
    try:
        return Path(args.token_file).read_text(encoding="utf-8").strip()
    except OSError as exc:
        raise ConfigError(f"cannot read --token-file {args.token_file}: {exc.strerror}") from exc


def _on_own_server(args: argparse.Namespace) -> int:
    from genie.devices import device_slot, resolve_device_type
    from genie.runtime.server_process import ServerProcess

    slot = device_slot(resolve_device_type(args.device), 0)
    token = secrets.token_hex(16)
    with (
        tempfile.TemporaryDirectory(prefix="genie-calibrate-") as logs,
        ServerProcess.start(slot, token=token, log_dir=Path(logs)) as server,
    ):
        before = os.sched_getaffinity(0)
        # What the client does must not be in the server's way.
        os.sched_setaffinity(0, (before - set(slot.cores) if slot.type == "cpu" else before) or before)
        try:
            _calibrate([server.address], token, args)
        finally:
            os.sched_setaffinity(0, before)
    return 0


def _calibrate(addresses: list[str], token: str | None, args: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    from genie.cost.calibrate import load_or_calibrate

    console = Console()
    started = time.monotonic()
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("measuring", total=None)

        def progress(device: str, count: int, total: int) -> None:
            bar.update(task, description=device, completed=count, total=total)

        models = load_or_calibrate(addresses, token, tls_ca=args.tls_ca, force=args.force, progress=progress)
    elapsed = time.monotonic() - started
    told: set[str] = set()
    for address, model in zip(addresses, models, strict=True):
        where = _stored_at(model)
        if where in told:
            console.print(f"{address}: {model.device}: the same calibration")
            continue
        told.add(where)
        _tell(console, address, model, where)
    console.print(f"{elapsed:.1f} s", style="dim")


def _stored_at(model: Any) -> str:
    from genie.cost import store

    return str(store.path_of(model.key))


def _tell(console: Any, address: str, model: Any, where: str) -> None:
    from rich.table import Table

    from genie.cost.families import FAMILIES
    from genie.cost.model import family_of_group

    for dtype, groups in model.groups.items():
        measured = model.measured.get(dtype, {})
        held_out, fitted = measured.get("held_out", {}), measured.get("fitted", {})
        table = Table(title=f"{address}: {model.device}, {dtype}", title_justify="left")
        table.add_column("family")
        for name in ("launch [us]", "GFLOP/s", "GB/s", "error held out", "error fitted"):
            table.add_column(name, justify="right")
        for family in FAMILIES:
            members = [g for name, g in groups.items() if family_of_group(name) == family]
            if not members:
                continue
            rate = max(g.rate for g in members) / 1e9
            table.add_row(
                family,
                f"{min(g.launch_s for g in members) * 1e6:.1f}",
                f"{rate:.0f}" if rate else "",
                f"{max(g.bandwidth for g in members) / 1e9:.1f}",
                _percent(held_out.get("by_family", {}).get(family)),
                _percent(fitted.get("by_family", {}).get(family)),
            )
        console.print(table)
        if held_out:
            rank = held_out["spearman"]
            console.print(
                f"held-out sizes: mean absolute error (MAPE) {held_out['mape']:.1f} %, rank correlation "
                f"(Spearman) {'unknown' if rank is None else f'{rank:.3f}'}",
                soft_wrap=True,
            )
    console.print(f"stored in {where}", soft_wrap=True)


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.1f} %"
