"""A plan as text that a person can read: what runs where, what moves, and what was not chosen."""

from __future__ import annotations

from collections.abc import Sequence

from genie.scheduler.plan import Declined, Plan, Transfer
from genie.scheduler.problem import Problem
from genie.scheduler.transfers import CLIENT
from genie.scheduler.validate import value_name
from genie.srg.graph import Node, Phase

#: lines of transfers that are shown one by one
MAX_TRANSFERS = 12


def explain(problem: Problem, plan: Plan) -> str:
    """Several lines, without a final newline. Times are predictions, in milliseconds."""
    graph, placement = problem.graph, plan.placement
    label = f" ({placement.label})" if placement.label else ""
    total = "" if plan.predicted_s is None else f", predicted {plan.predicted_s * 1e3:.2f} ms"
    if plan.join_s:
        total += f" (and {plan.join_s * 1e3:.2f} ms in the next window to join its state)"
    lines = [
        f"plan of {len(graph.nodes)} instructions over {len(problem.cluster.devices)} servers: "
        f"{placement.policy}{label}{total}",
        f"  because {placement.why}",
    ]
    for device in problem.cluster.devices:
        busy = plan.busy_s[device.index] if plan.busy_s else 0.0
        count = sum(device.index in s for s in placement.servers)
        work = f", {busy * 1e3:.2f} ms of work" if plan.predicted_s is not None else ""
        lines.append(f"  server {device.index} ({device.name}): {count} instructions{work}")
    if placement.split:
        rows = ", ".join(f"{s.start}:{s.stop} on server {s.server}" for s in placement.split.shards)
        lines.append(f"  batch of {placement.split.batch.size}: rows {rows}")
    lines += _ranges(problem, plan)
    lines += _moves(plan.transfers)
    if plan.considered:
        lines.append("  not chosen:")
        lines += [f"    {_declined(d)}" for d in plan.considered]
    lines += [f"  note: {note}" for note in plan.notes]
    return "\n".join(lines)


def _ranges(problem: Problem, plan: Plan) -> list[str]:
    """One line for each run of instructions on the same servers that belong to one part of the model."""
    nodes, servers = problem.graph.nodes, plan.placement.servers
    lines: list[str] = []
    start = 0
    for i in range(1, len(nodes) + 1):
        if i < len(nodes) and (_part(nodes[i]), servers[i]) == (_part(nodes[start]), servers[start]):
            continue
        first, last = nodes[start], nodes[i - 1]
        where = ", ".join(map(str, servers[start]))
        where = f"server {where}" if len(servers[start]) == 1 else f"servers {where}"
        part = nodes[start:i]
        line = f"  {first.number}-{last.number}: {_part_text(part)}{_modules(part)} on {where}"
        if plan.predicted_s is not None:
            seconds = max(_seconds(problem, plan, s, start, i) for s in servers[start])
            line += f", {seconds * 1e3:.2f} ms"
        lines.append(line)
        start = i
    return lines


def _seconds(problem: Problem, plan: Plan, server: int, start: int, stop: int) -> float:
    split = plan.placement.split
    whole = problem.seconds[server]
    if split is None or len(plan.placement.servers[start]) == 1:
        return sum(whole[start:stop])
    rows = next(s.rows for s in split.shards if s.server == server)
    part = problem.seconds_of_share(server, rows / split.batch.size)
    axes = split.batch.axes
    return sum(
        (part if any(v in axes for v in (*n.outputs, *n.inputs)) else whole)[n.number]
        for n in problem.graph.nodes[start:stop]
    )


def _part(node: Node) -> int | str:
    """A branch is one part, whatever was not recognised in its middle."""
    return node.phase.value if node.branch is None else node.branch


def _part_text(nodes: Sequence[Node]) -> str:
    phases = dict.fromkeys(n.phase.value for n in nodes if n.phase is not Phase.UNKNOWN)
    named = ["+".join(phases)] if phases else []
    if nodes[0].branch is not None:
        named.append(f"branch {nodes[0].branch}")
    return " ".join(named) or "instructions"


def _modules(nodes: Sequence[Node]) -> str:
    """The modules of a run, folded to the first and the last below what they have in common."""
    names = [n.module for n in nodes if n.module]
    if not names:
        return ""
    paths = [name.split(".") for name in dict.fromkeys(names)]
    common = 0
    while all(len(p) > common and p[common] == paths[0][common] for p in paths):
        common += 1
    prefix = ".".join(paths[0][:common])
    below = [p[common] for p in paths if len(p) > common]
    if not below:
        return f" {prefix}"
    ends = below[0] if below[0] == below[-1] else f"{below[0]}..{below[-1]}"
    return f" {prefix + '.' if prefix else ''}{ends}"


def _moves(moved: Sequence[Transfer]) -> list[str]:
    if not moved:
        return ["  nothing moves between servers"]
    lines = ["  moves:"]
    groups: dict[tuple[str, int, int, bool], list[Transfer]] = {}
    for t in moved:
        groups.setdefault((t.kind, t.source, t.target, t.once), []).append(t)
    for (kind, source, target, once), members in groups.items():
        origin = "client" if source == CLIENT else f"server {source}"
        what = "weights, once" if once else f"{kind} {', '.join(_named(members))}"
        nbytes = sum(t.nbytes for t in members)
        lines.append(f"    {origin} -> server {target}: {_bytes(nbytes)}, {what}")
    return lines


def _named(members: Sequence[Transfer]) -> list[str]:
    shown = [f"{value_name(t.value)} before {t.before}" for t in members[:MAX_TRANSFERS]]
    rest = len(members) - len(shown)
    return [*shown, f"and {rest} more"] if rest else shown


def _declined(d: Declined) -> str:
    time = "" if d.predicted_s is None else f", predicted {d.predicted_s * 1e3:.2f} ms"
    return f"{d.policy}{f' ({d.label})' if d.label else ''}{time}: {d.why}"


def _bytes(n: float) -> str:
    for prefix in ("", "k", "M"):
        if n < 1000:
            return f"{n:.4g} {prefix}B"
        n /= 1000
    return f"{n:.4g} GB"
