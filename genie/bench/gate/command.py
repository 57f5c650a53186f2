"""``genie gate``: fails when a cell became slower, sends something else, or is missing."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from genie.errors import CannotCompareError, ConfigError, ResultError

if TYPE_CHECKING:
    from genie.bench.gate.decision import Settings
    from genie.bench.gate.outcome import Outcome
    from genie.bench.gate.pairs import Suite

HELP = "decide whether a revision became slower than another one, or than a stored run"
#: of options that belong to one of the two modes
_AGAINST_ONLY = ("pairs", "rounds", "baselines", "profile", "resume", "allow_dirty", "keep")
#: a record of the command line keeps these out: they say where to write
_DESTINATIONS = ("json", "junit", "markdown")
DEFAULT_PAIRS = 10


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = _epilog()
    mode = parser.add_mutually_exclusive_group(required=True)
    mode.add_argument(
        "--against",
        metavar="REV",
        help="measure this revision and the working tree in turns, each in fresh processes",
    )
    mode.add_argument(
        "--stored",
        metavar="BASELINE.json",
        nargs="+",
        type=Path,
        help="stored runs to compare with, on ratios to local_pytorch; several show the spread between runs",
    )
    decision = parser.add_argument_group("the decision")
    decision.add_argument(
        "--floor",
        type=float,
        default=5.0,
        metavar="PERCENT",
        help="what is slower by less than this passes (default: 5)",
    )
    decision.add_argument(
        "--alpha",
        type=float,
        default=0.1,
        help="probability of one or more false alarms over all cells, in each of two stages (default: 0.1)",
    )
    decision.add_argument(
        "--accept-counters",
        action="store_true",
        help="changed bytes and round trips on the wire are meant: show them, do not fail",
    )
    stored = parser.add_argument_group("with --stored")
    stored.add_argument(
        "--current",
        metavar="RESULT.json",
        type=Path,
        help="judge this run; without it the suite is run now, and flagged cells again before they fail",
    )
    _add_against(parser.add_argument_group("with --against"))
    outputs = parser.add_argument_group(
        "outputs, beside the table; $GITHUB_STEP_SUMMARY is appended to when set"
    )
    outputs.add_argument("--json", metavar="FILE", type=Path, help="the complete record of the decision")
    outputs.add_argument("--junit", metavar="FILE", type=Path, help="JUnit XML, one test case per cell")
    outputs.add_argument("--markdown", metavar="FILE", type=Path, help="for a pull request")


def run(args: argparse.Namespace) -> int:
    """Exit status as in ``genie.bench.gate.exit_codes``."""
    from genie.bench.gate.decision import Settings
    from genie.bench.gate.exit_codes import ExitCode
    from genie.bench.gate.outcome import Outcome
    from genie.bench.gate.outputs import Destinations, step_summary, write_outputs
    from genie.bench.gate.terminal import print_outcome

    settings = Settings(floor=args.floor / 100, alpha=args.alpha, accept_counters=args.accept_counters)
    _check_mode(args)
    to = Destinations(args.json, args.junit, args.markdown, step_summary())
    to.check()
    started = time.monotonic()
    try:
        outcome = _decide(args, settings)
    except (CannotCompareError, ResultError) as error:
        outcome = Outcome(mode="against" if args.against else "stored", settings=settings, error=str(error))
    outcome = replace(outcome, wall_s=time.monotonic() - started, options=_options(args))
    print_outcome(outcome)
    sys.stdout.flush()
    problems = write_outputs(outcome, to)
    for problem in problems:
        print(f"genie gate: {problem}", file=sys.stderr)
    if problems and outcome.exit_code == ExitCode.PASSED:
        return ExitCode.ERROR
    return outcome.exit_code


def _add_against(group: argparse._ArgumentGroup) -> None:
    # No defaults here: an option of this group beside --stored is a mistake, and has to be seen.
    group.add_argument(
        "--pairs", type=int, metavar="N", help=f"pairs of processes a stage (default: {DEFAULT_PAIRS})"
    )
    group.add_argument(
        "--rounds", metavar="N[,WORKLOAD=M,...]", help="timed rounds per cell (default: by workload)"
    )
    group.add_argument(
        "--baselines", metavar="A,B,...", help="default: local_pytorch and the rows of genie_*"
    )
    group.add_argument("--profile", help="sizes of the workloads (default: smoke)")
    group.add_argument(
        "--resume",
        action="store_true",
        default=None,
        help="go on with the finished pairs of an interrupted run",
    )
    group.add_argument(
        "--allow-dirty", action="store_true", default=None, help="measure uncommitted changes, and record it"
    )
    group.add_argument(
        "--keep", action="store_true", default=None, help="leave the trees of both revisions in .genie/gate"
    )


def _epilog() -> str:
    # The texts live with the codes; importing them here costs no more than the standard library.
    from genie.bench.gate.exit_codes import EXIT_CODES

    lines = [f"  {int(code):3}  {text}" for code, text in EXIT_CODES.items()]
    return "\n".join(["exit status (of several findings: 5, 4, 1, 3):", *lines])


def _check_mode(args: argparse.Namespace) -> None:
    """Raises ConfigError for options of the other mode, which would silently do nothing."""
    if args.against is None:
        stray = [name for name in _AGAINST_ONLY if getattr(args, name) is not None]
        if stray:
            option = stray[0].replace("_", "-")
            raise ConfigError(
                f"--{option} goes with --against: leave it out, a stored run brings its own options"
            )
    elif args.current is not None:
        raise ConfigError("--current goes with --stored: --against measures both sides itself")


def _decide(args: argparse.Namespace, settings: Settings) -> Outcome:
    if args.against is not None:
        return _against(args, settings)
    from genie.bench.gate.stored_mode import gate_stored

    with tempfile.TemporaryDirectory(prefix="genie-gate-") as folder:
        return gate_stored(args.stored, args.current, settings, Path(folder))


def _against(args: argparse.Namespace, settings: Settings) -> Outcome:
    from genie.bench.gate.against_mode import gate_against
    from genie.bench.gate.decision import check_pairs
    from genie.bench.gate.outcome import Side
    from genie.bench.gate.pairs import CACHE, against
    from genie.bench.gate.revisions import Revision

    pairs = DEFAULT_PAIRS if args.pairs is None else args.pairs
    check_pairs(pairs)  # before an environment is built for nothing

    def side(revision: Revision) -> Side:
        return Side(revision.name, revision.commit, revision.dirty, pairs)

    def tell(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    with against(
        args.against,
        _suite(args),
        tell=tell,
        allow_dirty=bool(args.allow_dirty),
        keep=bool(args.keep),
        resume=bool(args.resume),
    ) as (runner, old, new):
        outcome = gate_against(runner, pairs, settings, side(old), side(new))
    if outcome.findings:
        outcome = replace(outcome, note=f"Results and logs of every process lie in {CACHE / 'state'}.")
    return outcome


def _suite(args: argparse.Namespace) -> Suite:
    """What each process measures. Raises ConfigError here, and not after the first process."""
    import pytest

    from genie.bench.gate.pairs import Suite
    from genie.bench.options import BASELINES, PROFILES, read_rounds

    suite = Suite()
    if args.profile is not None:
        if args.profile not in PROFILES:
            raise ConfigError(f"--profile {args.profile} is unknown: choose one of {', '.join(PROFILES)}")
        suite = replace(suite, profile=args.profile)
    if args.baselines is not None:
        names = tuple(name.strip() for name in args.baselines.split(",") if name.strip())
        unknown = [name for name in names if name not in BASELINES]
        if unknown or not names:
            raise ConfigError(
                f"--baselines: unknown baseline {', '.join(unknown) or repr(args.baselines)}: "
                f"choose from {', '.join(BASELINES)}"
            )
        suite = replace(suite, baselines=names)
    if args.rounds is not None:
        try:
            read_rounds(args.rounds)
        except pytest.UsageError as error:
            raise ConfigError(str(error).replace("--genie-rounds", "--rounds")) from None
        suite = replace(suite, rounds=args.rounds)
    return suite


def _options(args: argparse.Namespace) -> dict[str, Any]:
    """The command line for the record: what was given, without where it is written to."""
    left_out = {*_DESTINATIONS, "run", "command"}
    return {
        name: [str(one) for one in value]
        if isinstance(value, list)
        else str(value)
        if isinstance(value, Path)
        else value
        for name, value in vars(args).items()
        if name not in left_out and value is not None
    }
