"""``genie results``: options. Imports nothing heavy."""

from __future__ import annotations

import argparse
from pathlib import Path

from genie.errors import ConfigError

HELP = "write the Markdown page of published results from result files"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "results",
        nargs="+",
        type=Path,
        metavar="RESULT.json",
        help="result files, each a section of the page, in this order",
    )
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        required=True,
        metavar="FILE.md",
        help="the page to write; an older one is replaced only when the new is whole",
    )
    parser.add_argument("--title", default="Results", help="heading of the page (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    output: Path = args.output
    paths = list({path.resolve(): path for path in args.results}.values())
    if output.resolve() in {path.resolve() for path in paths}:
        raise ConfigError(f"-o {output} is one of the result files: give the page another name")
    from genie.bench.report.output import write_page
    from genie.bench.results import load_result
    from genie.bench.results_page.page import render

    results = [load_result(path) for path in paths]
    write_page(output, render(results, args.title))
    print(f"{output}: {sum(len(result.cells) for result in results)} benchmarks of {len(results)} file(s)")
    return 0
