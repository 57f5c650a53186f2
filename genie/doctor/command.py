"""``genie doctor``: checks an installation and its machine, and says what to do about each problem."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict

from genie.doctor.findings import NOT_APPLICABLE, OK, PROBLEM, WARNING, Check, Finding, Request, findings_of
from genie.errors import ConfigError

HELP = "check the installation and the machine, and say what to do about each problem"
PROFILES = ("smoke", "cpu", "gpu")
_STYLES = {OK: "green", WARNING: "yellow", PROBLEM: "bold red", NOT_APPLICABLE: "dim"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--json", action="store_true", help="print JSON instead of a table")
    add("--full", action="store_true", help="also start Ray and PyTorch RPC (half a minute)")
    add("--port", type=int, help="also check whether a server could listen on this port, and who holds it")
    add(
        "--profile", choices=PROFILES, help="check memory for this profile (default: gpu with CUDA, else cpu)"
    )
    add("--only", metavar="CHECK,...", help="run only these checks; an unknown name lists all")


def run(args: argparse.Namespace) -> int:
    """1 when there is a problem, 0 otherwise: a warning does not fail. Raises ConfigError."""
    if args.port is not None and not 0 < args.port < 65536:
        raise ConfigError(f"--port {args.port}: a port is a number from 1 to 65535")
    checks = _selected(args.only)
    request = Request(full=args.full, port=args.port, profile=args.profile)
    found = _watched(checks, request)
    if args.json:
        print(json.dumps(_as_json(found), indent=2))
    else:
        _print_table(found)
    return int(any(one.status == PROBLEM for one in found))


def checks() -> list[Check]:
    """All of them, in the order of the table. The quiet ones come before those that start processes."""
    from genie.doctor import canary, clocks, cores, device, libraries, memory, network, peers, runtime, tools

    install = libraries.INSTALL
    server = "see the log above; ports and memory below may say why"
    sandbox = "run outside of this sandbox, or let it do this"
    return [
        Check("python", libraries.check_python, install),
        Check("torch", libraries.check_torch, install),
        Check("torchvision", libraries.check_torchvision, install, ("torch",)),
        Check("transformers", libraries.check_transformers, install, ("torch",)),
        Check("libraries", libraries.check_others, install),
        Check("device", device.check_device, install, ("torch", "pynvml")),
        Check("nvml", device.check_nvml, install, ("torch", "pynvml")),
        Check("gpu-clocks", device.check_gpu_clocks, install, ("pynvml",)),
        Check("pinning", cores.check_pinning, sandbox),
        Check("quota", cores.check_quota, sandbox),
        Check("cores", cores.check_free_cores, sandbox, ("psutil",)),
        Check("frequency", clocks.check_frequency, sandbox),
        Check("clock", clocks.check_clock, sandbox),
        Check("noise", canary.check_canary, install, ("torch",)),
        Check("memory", memory.check_memory, sandbox, ("torch", "psutil")),
        Check("shm", memory.check_shared_memory, sandbox),
        Check("tmp", memory.check_temporary, "set TMPDIR to a folder that exists and can be written"),
        Check("ports", network.check_ports, sandbox),
        Check("tcp-counters", network.check_tcp_counters, sandbox),
        Check("genie", runtime.check_in_process, runtime.WRONG, ("torch",)),
        Check("server", runtime.check_server, server, ("torch",)),
        Check("rpc", peers.check_rpc, install, ("torch",)),
        Check("ray", peers.check_ray, install),
        Check("git", tools.check_git, sandbox),
    ]


def _selected(only: str | None) -> list[Check]:
    every = checks()
    if only is None:
        return every
    names = [check.name for check in every]
    wanted = [name.strip() for name in only.split(",") if name.strip()]
    unknown = [name for name in wanted if name not in names]
    if unknown or not wanted:
        raise ConfigError(
            f"--only: no check {', '.join(unknown) or repr(only)}; choose from {', '.join(names)}"
        )
    return [check for check in every if check.name in wanted]


def _watched(selected: Sequence[Check], request: Request) -> list[Finding]:
    """Runs the checks; a terminal sees which one it waits for."""
    from rich.console import Console

    found: list[Finding] = []
    console = Console(stderr=True)
    for check in selected:
        if console.is_terminal:
            console.print(f"checking {check.name} ...", end="\r", highlight=False)
        found += findings_of(check, request)
        if console.is_terminal:
            console.file.write("\x1b[2K")
    return found


def _as_json(found: Sequence[Finding]) -> dict[str, object]:
    from genie import __version__

    return {
        "genie": __version__,
        "problems": sum(one.status == PROBLEM for one in found),
        "warnings": sum(one.status == WARNING for one in found),
        "checks": [asdict(one) for one in found],
    }


def _print_table(found: Sequence[Finding]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    for title in ("check", "status", "found, and what to do"):
        table.add_column(title, overflow="fold", no_wrap=title == "status")
    for one in found:
        text = Text(one.found)
        if one.remedy:
            text.append(f"\n-> {one.remedy}", style=_STYLES[one.status])
        table.add_row(Text(one.name), Text(one.status, style=_STYLES[one.status]), text)
    # A log file gets whole lines of a fixed width instead of rich's guess of 80 columns.
    console = Console() if sys.stdout.isatty() else Console(width=160)
    console.print(table)
    counts = _as_json(found)
    console.print(f"\n{counts['problems']} problem(s), {counts['warnings']} warning(s)", highlight=False)
