"""``genie gate-power``: the gate measured: how often it cries wolf, and how often it sees a slow-down."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from genie.errors import CannotCompareError, ConfigError

if TYPE_CHECKING:
    from genie.bench.gate.pairs import Suite
    from genie.bench.gate.power import Power, Rate, Step
    from genie.bench.gate.process import Side

HELP = "measure the gate itself: false alarms on equal code, detections of a slow-down made on purpose"
#: results of the last measurement, in the repository's cache
FOLDER = "power"
_TIMES = "times.json"
#: the processes of a step: A, A' of the same code, and B with the slow-down, which measures the slowed
#: workload only
LABELS = ("a", "same", "slow")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    measuring = parser.add_argument_group("measuring")
    measuring.add_argument("--steps", type=int, default=20, metavar="N", help="of three processes each (20)")
    measuring.add_argument("--workload", default="llm_decode", help="the one to slow down (llm_decode)")
    measuring.add_argument("--share", type=float, default=10.0, metavar="PERCENT", help="how much (10)")
    measuring.add_argument(
        "--select", default="", metavar="EXPR", help="measure only these cells (pytest's -k)"
    )
    measuring.add_argument("--rounds", metavar="N", help="timed rounds per cell (the gate's)")
    measuring.add_argument("--allow-dirty", action="store_true", help="measure uncommitted changes, too")
    measuring.add_argument("--resume", action="store_true", help="go on with an interrupted measurement")
    analysis = parser.add_argument_group("analysis")
    analysis.add_argument(
        "--from", dest="folder", type=Path, metavar="FOLDER", help="analyse these results, measure nothing"
    )
    analysis.add_argument("--pairs", type=int, default=10, metavar="N", help="of a gate run's stages (10)")
    analysis.add_argument("--floor", type=float, default=5.0, metavar="PERCENT", help="of the gate (5)")
    analysis.add_argument("--alpha", type=float, default=0.1, help="of the gate (0.1)")
    analysis.add_argument("--runs", type=int, default=300, metavar="N", help="gate runs to draw (300)")
    analysis.add_argument("--seed", type=int, default=0, help="of the drawing (0)")
    analysis.add_argument("--json", type=Path, metavar="FILE", help="write the figures here, too")


def run(args: argparse.Namespace) -> int:
    """Measures (or reads) and prints; exit status 0 whatever the figures are."""
    from genie.bench.gate.decision import Settings
    from genie.bench.gate.power import power

    settings = Settings(floor=args.floor / 100, alpha=args.alpha)
    _check(args)
    folder = args.folder if args.folder is not None else measure_steps(args)
    steps = load_steps(folder)
    found = power(steps, args.pairs, settings, args.runs, args.seed)
    seconds = _seconds(folder)
    for line in lines(found, settings.floor, seconds):
        print(line)
    if args.json is not None:
        record = {
            "schema_version": 1,
            "kind": "genie gate-power",
            "measured": _read(folder / "settings.json"),
            "settings": {**asdict(settings), "pairs": args.pairs, "runs": args.runs, "seed": args.seed},
            "process_s": _process_seconds(seconds),
            **asdict(found),
        }
        try:
            args.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"cannot write {args.json}: {error.strerror}: give another file") from None
    return 0


def measure_steps(args: argparse.Namespace) -> Path:
    """Measures what is missing of ``args.steps`` steps; returns the folder of their results."""
    from genie.bench.gate import revisions
    from genie.bench.gate.pairs import CACHE, Suite, open_state
    from genie.bench.gate.process import Side, ended_by_sigterm

    repository = revisions.repository_of(Path())
    cache = repository / CACHE
    folder = cache / FOLDER
    suite = Suite(select=args.select, **({"rounds": args.rounds} if args.rounds else {}))
    made = revisions.prepare(None, repository=repository, cache=cache, allow_dirty=args.allow_dirty)
    with ended_by_sigterm(), made as (a, b):
        facts = {"code": a.identity, "workload": args.workload, "share": args.share, **asdict(suite)}
        open_state(folder, {**facts, "baselines": list(suite.baselines)}, resume=args.resume)
        slow = (
            "-p", "genie.bench.gate.slowdown", "--genie-slow-workload", args.workload,
            "--genie-slow-share", str(args.share / 100),
            # B need not measure what is not slowed: there A stands for it.
            "-k", f"({args.select}) and {args.workload}" if args.select else args.workload,
        )  # fmt: skip
        sides = {
            "a": Side("a", f"A, {a}", a.tree),
            "same": Side("same", f"A', {b}", b.tree),
            "slow": Side(
                "slow", f"B, {b} with {args.share:g} % more in {args.workload}", b.tree, arguments=slow
            ),
        }
        _measure_missing(sides, suite, folder, args.steps)
    return folder


def _measure_missing(sides: dict[str, Side], suite: Suite, folder: Path, steps: int) -> None:
    from genie.bench.gate.pairs import write_json
    from genie.bench.gate.process import measure

    times = _read(folder / _TIMES) if (folder / _TIMES).exists() else {}
    missing = [
        step for step in range(steps) if not all((folder / _name(step, label)).exists() for label in LABELS)
    ]
    for side in sides.values():
        _tell(f"{side.label}: {side.name}")
    try:
        for number, step in enumerate(missing):
            left = (
                f", about {median(times.values()) * (len(missing) - number) / 60:.0f} min left"
                if times
                else ""
            )
            _tell(f"step {step + 1} of {steps}{left}")
            start = time.monotonic()
            runs = [(sides[label], folder / _name(step, label)) for label in LABELS]
            measure(runs, suite.arguments(), mirrored=bool(step % 2))
            times[str(step)] = round(time.monotonic() - start, 2)
            write_json(folder / _TIMES, times)
    except KeyboardInterrupt:
        _tell(f"stopped: finished steps are kept in {folder}; go on with --resume")
        raise


def load_steps(folder: Path) -> list[Step]:
    """All complete steps in ``folder``. Raises CannotCompareError when there are none, and ResultError."""
    from genie.bench.gate.power import Step
    from genie.bench.gate.slowdown import added_share
    from genie.bench.results import load_result

    steps = []
    for first in sorted(folder.glob(f"step-*-{LABELS[0]}.json")):
        files = [first.with_name(_name(int(first.name.split("-")[1]), label)) for label in LABELS]
        if all(file.exists() for file in files):
            a, same, slow = map(load_result, files)
            slow = replace(slow, cells={**a.cells, **slow.cells})
            steps.append(Step(a, same, slow, added_share(_read(files[-1]))))
    if not steps:
        raise CannotCompareError(f"{folder} holds no complete step: measure with `genie gate-power`")
    return steps


def lines(found: Power, floor: float, seconds: Sequence[float]) -> list[str]:
    """The figures as text."""
    high, low = found.false_alarms.high, found.detected.low
    told = [
        f"{found.steps} steps; gate runs of {found.pairs} pairs and {found.again} to confirm, "
        f"floor {floor:.0%}, drawn from them ({found.disjoint_runs} without sharing a step)",
        "",
        f"A/A  false alarms            {_told(found.false_alarms)} decisions, at most {high:.2%}",
        f"     before confirmation     {_told(found.flagged_first)} decisions",
        f"     runs with a false alarm {_told(found.alarmed_runs)} runs",
    ]
    if found.slow_cells:
        told += [
            f"A/B  detected                {_told(found.detected)} decisions, at least {low:.2%}",
            f"     runs that detect it     {_told(found.detected_runs)} runs",
            f"     alarms in other cells   {_told(found.others)} decisions",
        ]
        width = max(len(cell.id) for cell in found.slow_cells)
        told += ["", f"{'slow cell':{width}}    added    B / A  detected"]
        for cell in found.slow_cells:
            told.append(f"{cell.id:{width}}  {cell.added:7.1%}  {cell.ratio:7.3f}  {cell.detected.rate:8.1%}")
    if seconds:
        one = _process_seconds(seconds) or 0.0
        told += [
            "",
            f"{one:.1f} s a process: {2 * found.pairs * one / 60:.1f} min for {found.pairs} pairs",
        ]
    told.append("bounds: Clopper-Pearson, one-sided, 95 %, as if decisions were independent")
    return told


def _process_seconds(seconds: Sequence[float]) -> float | None:
    """Wall time of a step, shared out over its processes, which take turns."""
    return median(seconds) / len(LABELS) if seconds else None


def _told(one: Rate) -> str:
    return f"{one.rate:7.2%}  {one.count} of {one.decisions}"


def _check(args: argparse.Namespace) -> None:
    from genie.bench.gate.decision import LEAST_PAIRS
    from genie.workloads import WORKLOADS

    if args.workload not in WORKLOADS:
        raise ConfigError(f"--workload {args.workload} is unknown: choose one of {', '.join(WORKLOADS)}")
    if not 0 < args.share <= 1000:
        raise ConfigError(f"--share {args.share:g} is out of range: give a percentage above 0")
    if args.folder is not None and args.resume:
        raise ConfigError("--from measures nothing, so there is nothing to resume: give one of the two")
    if args.folder is None and args.steps < args.pairs + LEAST_PAIRS:
        raise ConfigError(
            f"--steps {args.steps} is too few for --pairs {args.pairs} and {LEAST_PAIRS} to confirm with: "
            f"give --steps {2 * args.pairs}, or fewer --pairs"
        )
    if args.runs < 1:
        raise ConfigError(f"--runs {args.runs}: give 1 or more")


def _name(step: int, label: str) -> str:
    return f"step-{step:03}-{label}.json"


def _seconds(folder: Path) -> list[float]:
    return list(_read(folder / _TIMES).values()) if (folder / _TIMES).exists() else []


def _read(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CannotCompareError(f"cannot read {file}: {error}: measure again") from None


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
