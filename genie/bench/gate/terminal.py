"""The decision as a table on the terminal: what fails first, then everything else."""

from __future__ import annotations

import sys
from typing import TextIO

from genie.bench.gate.exit_codes import ExitCode
from genie.bench.gate.outcome import BLIND_RATIO, CellOutcome, Outcome, Verdict

#: most telling first
ORDER = (
    Verdict.MISSING,
    Verdict.SLOWER,
    Verdict.NOT_CONFIRMED,
    Verdict.FASTER,
    Verdict.NEW,
    Verdict.TOO_FEW,
    Verdict.SAME,
    Verdict.REFERENCE,
)
HEAD = ("group", "row", "old", "new", "ratio", "bound", "detectable", "p (Holm)", "verdict")
_STYLES = {Verdict.MISSING: "bold red", Verdict.SLOWER: "bold red", Verdict.FASTER: "green"}
#: where there is no terminal to fit into
_PLAIN_WIDTH = 160


def print_outcome(outcome: Outcome, file: TextIO | None = None) -> None:
    """Colours only on a terminal; plain lines of full width elsewhere."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    file = file or sys.stdout
    console = Console(file=file, width=None if file.isatty() else _PLAIN_WIDTH, highlight=False)
    if outcome.cells:
        table = Table(title=_title(outcome), title_justify="left", pad_edge=False)
        for number, name in enumerate(HEAD):
            table.add_column(name, justify="left" if number in (0, 1, 8) else "right", overflow="fold")
        for cell in by_weight(outcome):
            table.add_row(*map(Text, row(cell)), style=_STYLES.get(cell.verdict))
        console.print(table)
    for line in notes(outcome):
        console.print(Text(line))
    style = "bold green" if outcome.exit_code == ExitCode.PASSED else "bold red"
    console.print(Text(verdict_line(outcome), style=style))


def by_weight(outcome: Outcome) -> list[CellOutcome]:
    """Cells with changed counters come right after those that are missing or slower."""

    def weight(cell: CellOutcome) -> float:
        place = ORDER.index(cell.verdict)
        return min(place, 1.5) if cell.changes else place

    return sorted(outcome.cells, key=weight)


def row(cell: CellOutcome) -> tuple[str, ...]:
    """As ``HEAD``; n/a where the data does not tell."""
    judged = cell.decided_by
    if judged is None:
        figures = ("-", "-", "-", "-")
    else:
        bound = judged.upper if cell.verdict is Verdict.FASTER else judged.lower
        p = judged.p_faster if cell.verdict is Verdict.FASTER else judged.p_slower
        sign = "<=" if cell.verdict is Verdict.FASTER else ">="
        detectable = "n/a" if judged.detectable is None else f"{judged.detectable:.3g}"
        figures = (f"{judged.ratio:.3f}", f"{sign} {bound:.3f}", detectable, f"{p:.3g}")
    verdict = str(cell.verdict) + (" + counters" if cell.changes else "")
    return (cell.group, cell.label, seconds(cell.old_s), seconds(cell.new_s), *figures, verdict)


def notes(outcome: Outcome) -> list[str]:
    """What does not fit into a table: why a cell is missing, which counters changed."""
    lines = [f"{cell.id}: {cell.verdict}: {cell.detail}" for cell in by_weight(outcome) if cell.detail]
    lines += [f"{cell.id}: {change}" for cell in outcome.changed for change in cell.changes]
    if outcome.changed:
        lines.append(counters_remedy(outcome))
    if outcome.blind:
        lines.append(noise_note(outcome))
    if outcome.note:
        lines.append(outcome.note)
    return lines


def noise_note(outcome: Outcome) -> str:
    """A pass that says little has to say so."""
    more = "more --pairs and --rounds" if outcome.mode == "against" else "several stored runs, or --against"
    return (
        f"Too noisy to tell: {len(outcome.blind)} of {len(outcome.cells)} cells could have become "
        f"{100 * (BLIND_RATIO - 1):.0f} % slower and passed (column detectable): use a quieter machine, "
        f"or {more}."
    )


def counters_remedy(outcome: Outcome) -> str:
    if outcome.settings.accept_counters:
        return "Changed counters were accepted (--accept-counters)."
    return (
        "Counters on the wire are gated exactly, less as well as more. If the change is meant, say so in the "
        "commit message and run the gate with --accept-counters."
    )


def verdict_line(outcome: Outcome) -> str:
    name = outcome.exit_code.name.replace("_", " ")
    return f"{name} (exit {int(outcome.exit_code)}): {outcome.summary()}; {duration(outcome.wall_s)}"


def seconds(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.3f} s" if value >= 10 else f"{value * 1e3:.3f} ms"


def duration(value: float) -> str:
    return f"{value:.1f} s" if value < 100 else f"{int(value) // 60} min {int(value) % 60} s"


def _title(outcome: Outcome) -> str:
    settings = outcome.settings
    return (
        f"{outcome.old} -> {outcome.new}: floor {100 * settings.floor:g} %, "
        f"alpha {settings.alpha:g} (familywise, one-sided)"
    )
