"""Runs a workload on a pool as ``genie_full`` does, prints its plans, and measures the alternatives."""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

from rich.console import Console
from rich.table import Table

from genie.baselines.genie_remote import GenieFull
from genie.bench.placement import client_cores, placed
from genie.bench.pool import StartedServers
from genie.bench.reference import Reference, as_returned
from genie.config import POOL_FEATURES
from genie.cost.pool import pool_costs
from genie.devices import (
    available_cores,
    cores_per_device,
    device_slot,
    resolve_device_type,
)
from genie.errors import ConfigError, MeasurementError, VerificationError
from genie.runtime.open_pool import policies_of
from genie.runtime.pool import Explained
from genie.scheduler.explain import explain
from genie.scheduler.forced import Forced
from genie.scheduler.problem import Policy
from genie.server.command import parse_size
from genie.workloads import make_workload
from genie.workloads.protocol import Workload

#: requests before anything is told: the first captures, the second plans with true layouts
WARM_UP = 3


@dataclass
class Alternative:
    """One way to run the workload's heaviest window. ``predicted_ms``: the window; ``measured_ms``: medians
    of whole requests."""

    policy: str
    label: str
    chosen: bool
    predicted_ms: float | None
    measured_ms: float = 0.0


def explain_workload(args: argparse.Namespace, features: frozenset[str]) -> int:
    """Prints to stdout. Raises ConfigError, ConnectError, VerificationError, MeasurementError."""
    device = resolve_device_type(args.device)
    profile = args.profile or ("gpu" if device == "cuda" else "cpu")
    workload = make_workload(args.workload, profile)
    console = Console(width=140, soft_wrap=True)
    with _servers(device, args.servers, parse_size(args.memory_limit)) as servers:
        addresses, token = servers.addresses, servers.token
        if len(addresses) < 2:
            raise ConfigError(
                "a pool of one server leaves nothing to schedule: give --servers 2 (or more) to see plans"
            )
        costs = pool_costs(addresses, token) if "cost_model" in features else None
        local = device_slot(device, 0)

        def session(policies: Sequence[Policy] | None = None) -> GenieFull:
            full = GenieFull(addresses, token, features, costs=lambda: costs, policies=policies)
            full.prepare(workload)
            return full

        with placed(client_cores(local, True)), closing(session()) as full:
            windows = _planned(workload, full)
            for number, one in enumerate(windows):
                console.rule(f"window {number + 1} of {len(windows)}", align="left")
                if args.graph:
                    console.print(str(one.problem.graph), markup=False, highlight=False)
                console.print(explain(one.problem, one.plan), markup=False, highlight=False)
                console.print(f"  annotated and planned in {one.seconds * 1e3:.1f} ms", highlight=False)
            if args.measure:
                policies = policies_of(features & {*POOL_FEATURES})
                reference = Reference(workload, local)
                found = _measure(workload, windows, full, session, policies, reference, args.measure)
                _print(console, workload, found, args.measure)
                if args.json:
                    args.json.write_text(json.dumps([asdict(a) for a in found], indent=1) + "\n")
    return 0


@contextmanager
def _servers(device: str, count: int | None, memory_limit: int) -> Iterator[StartedServers]:
    if count is None and device == "cuda":
        import torch

        count = torch.cuda.device_count()
    count = count or min(2, len(available_cores()) // cores_per_device())
    slots = [device_slot(device, index) for index in range(count)]
    extra = ["--memory-limit", str(memory_limit)] if memory_limit else []
    with (
        tempfile.TemporaryDirectory(prefix="genie-logs-") as logs,
        closing(StartedServers(slots, Path(logs), extra_args=extra)) as servers,
    ):
        yield servers


def _planned(workload: Workload, full: GenieFull) -> list[Explained]:
    """The windows of a warm request (of the workload's last case), each once."""
    for index in range(WARM_UP):
        full.run(workload.request(index, workload.cases[-1]))
        full.account()
    return full.followed


def _measure(
    workload: Workload, windows: list[Explained], chosen: GenieFull,
    session: Callable[[Sequence[Policy]], GenieFull], policies: Sequence[Policy], reference: Reference,
    rounds: int,
) -> list[Alternative]:  # fmt: skip
    """Every response is verified, and every plan seen to be followed, outside of what is timed. ``chosen``:
    the session that planned ``windows``; ``session`` makes another, with policies of its own."""
    heaviest = max(windows, key=lambda w: (w.plan.predicted_s or 0.0, len(w.problem.graph.nodes)))
    plan = heaviest.plan
    first = plan.placement
    found = [Alternative(first.policy, first.label, True, _ms(plan.predicted_s))]
    seen = {(first.policy, first.label)}
    for other in plan.considered:
        if other.predicted_s is not None and (other.policy, other.label) not in seen:
            seen.add((other.policy, other.label))
            found.append(Alternative(other.policy, other.label, False, _ms(other.predicted_s)))
    times: list[list[float]] = [[] for _ in found]
    with ExitStack() as stack:
        runs = [chosen]
        for a in found[1:]:
            runs.append(stack.enter_context(closing(session([Forced(policies, a.policy, a.label)]))))
        for index in range(WARM_UP + rounds):
            for alternative, full, taken in zip(found, runs, times, strict=True):
                seconds = request_seconds(full, workload, index, reference)
                if index >= WARM_UP:
                    check_followed(full, alternative)
                    taken.append(seconds)
    for alternative, taken in zip(found, times, strict=True):
        alternative.measured_ms = median(taken) * 1e3
    return found


def request_seconds(full: GenieFull, workload: Workload, index: int, reference: Reference) -> float:
    """Of one request. Raises VerificationError where it was not answered as it is locally."""
    case = workload.cases[-1]
    request = workload.request(index, case)
    started = time.perf_counter()
    response = full.run(request)
    taken = time.perf_counter() - started
    response = as_returned(response)
    full.account()
    verdict = reference.judge(index, case, response)
    if not verdict.ok:
        raise VerificationError(
            f"{workload.name}, request {index} {case}: the result differs from the local one: "
            f"{verdict.detail or 'no detail'} (max abs error {verdict.max_abs_err})"
        )
    return taken


def check_followed(full: GenieFull, alternative: Alternative) -> None:
    """Raises MeasurementError where something else was measured than what stands in the row."""
    placements = [one.plan.placement for one in full.followed]
    if not any((p.policy, p.label) == (alternative.policy, alternative.label) for p in placements):
        told = ", ".join(f"{p.policy} ({p.label})" for p in placements) or "nothing"
        raise MeasurementError(
            f"{alternative.policy} ({alternative.label}) was to be measured, but {told} was followed: "
            "a policy must propose the same for the same window: correct it, or leave --measure out"
        )


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else seconds * 1e3


def _print(console: Console, workload: Workload, found: list[Alternative], rounds: int) -> None:
    table = Table(title=f"{workload.name}, {workload.profile}: medians of {rounds} requests, in turn")
    table.add_column("plan")
    for name in ("predicted ms", "measured ms", "error"):
        table.add_column(name, justify="right")
    for a in sorted(found, key=lambda a: a.measured_ms):
        predicted = "" if a.predicted_ms is None else f"{a.predicted_ms:.1f}"
        error = "" if a.predicted_ms is None else f"{a.predicted_ms / a.measured_ms - 1:+.0%}"
        name = f"{a.policy} {f'({a.label})' if a.label else ''}{' (chosen)' if a.chosen else ''}"
        table.add_row(name, predicted, f"{a.measured_ms:.1f}", error)
    console.print(table)
    chosen = next(a for a in found if a.chosen)
    best = min(a.measured_ms for a in found)
    console.print(f"regret of the chosen plan: {chosen.measured_ms / best - 1:.1%}", highlight=False)
