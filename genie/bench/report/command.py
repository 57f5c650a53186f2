"""``genie report``: options. Imports nothing heavy."""

from __future__ import annotations

import argparse
from pathlib import Path

from genie.errors import ConfigError

HELP = "make one self-contained HTML page from result files"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "results",
        nargs="+",
        type=Path,
        metavar="RESULT.json",
        help="result files, in any order: what --benchmark-json wrote or --benchmark-autosave stored",
    )
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        default=Path("report.html"),
        metavar="FILE",
        help="the page to write (default: report.html); an older one is replaced only when the new is whole",
    )


def run(args: argparse.Namespace) -> int:
    output: Path = args.output
    # A file that is given twice, by two patterns of the shell say, is one run and not two.
    paths = list({path.resolve(): path for path in args.results}.values())
    if output.resolve() in {path.resolve() for path in paths}:
        raise ConfigError(f"-o {output} is one of the result files: give the page another name")
    from genie.bench.report.output import write_page
    from genie.bench.report.page import render
    from genie.bench.report.series import group_runs
    from genie.bench.results import load_results

    results = load_results(paths)
    series = group_runs(results)
    page = render(series)
    write_page(output, page)
    several = f" in {len(series)} series of different fingerprints" if len(series) > 1 else ""
    print(f"{output}: {_count(len(results), 'run')}{several}, {len(page.encode()) / 1e6:.2f} MB")
    return 0


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
