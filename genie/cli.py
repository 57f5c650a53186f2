"""The ``genie`` command. Each subcommand is one module with HELP, add_arguments(parser) and run(args)."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from genie.errors import GenieError

COMMANDS: dict[str, str] = {
    "serve": "genie.server.command",
    "report": "genie.bench.report.command",
    "results": "genie.bench.results_page.command",
    "gate": "genie.bench.gate.command",
    "gate-power": "genie.bench.gate.calibrate",
    "explain": "genie.bench.explain.command",
    "doctor": "genie.doctor.command",
    "calibrate": "genie.cost.command",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: that of the subcommand, or 2 for an error, told in one line."""
    parser = argparse.ArgumentParser(prog="genie", description="Remote-accelerator runtime for PyTorch.")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="command")
    given = sys.argv[1:] if argv is None else argv
    # Only the command that is asked for is imported: a server starts sooner, and does not need the others.
    names = [given[0]] if given and given[0] in COMMANDS else list(COMMANDS)
    for name in names:
        module = importlib.import_module(COMMANDS[name])
        subparser = subparsers.add_parser(name, help=module.HELP, description=module.HELP)
        module.add_arguments(subparser)
        subparser.set_defaults(run=module.run)
    args = parser.parse_args(argv)
    try:
        return int(args.run(args))
    except GenieError as exc:
        print(f"genie {args.command}: {exc}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
