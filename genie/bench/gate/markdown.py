"""The decision for a pull request: what changed in a short table first, everything else folded away."""

from __future__ import annotations

import html
import json
from collections.abc import Iterable, Sequence

from genie.bench.gate.counters import Shown
from genie.bench.gate.exit_codes import ExitCode
from genie.bench.gate.outcome import CellOutcome, Outcome, Verdict
from genie.bench.gate.terminal import HEAD, by_weight, counters_remedy, duration, noise_note, row

#: of a cell's changed counters this many are told here; the JSON record has all
_TOLD = 4
_CALM = (Verdict.SAME, Verdict.REFERENCE)


def markdown(outcome: Outcome) -> str:
    """GitHub's flavour; ends with a newline, so that it can be appended to."""
    passed = outcome.exit_code == ExitCode.PASSED
    title = outcome.exit_code.name.replace("_", " ").lower()
    blocks = [f"## Genie gate: {'passed' if passed else f'**{title}**'}", _text(outcome.summary())]
    if outcome.old and outcome.new:
        blocks.append(f"`{outcome.old}` -> `{outcome.new}`, wall time {duration(outcome.wall_s)}")
    telling = [cell for cell in by_weight(outcome) if cell.changes or cell.verdict not in _CALM]
    if telling:
        blocks.append(_table(("row", "time", "verdict", "what"), map(_telling_row, telling)))
    if outcome.changed:
        blocks.append(_text(counters_remedy(outcome)))
    if outcome.blind:
        blocks.append(_text(noise_note(outcome)))
    if outcome.note:
        blocks.append(f"_{_text(outcome.note)}_")
    if outcome.cells:
        blocks.append(_folded(f"All {len(outcome.cells)} cells", _table(HEAD, map(row, by_weight(outcome)))))
    shown = [(cell, one) for cell in outcome.cells for one in cell.shown if _moved(one, outcome)]
    if shown:
        blocks.append(
            _folded(
                f"{len(shown)} counters that are not gated changed",
                _table(("group", "row", "counter", "old", "new"), (_shown_row(*pair) for pair in shown)),
            )
        )
    blocks.append(_folded("Settings and fingerprint", _settings(outcome)))
    return "\n\n".join(blocks) + "\n"


def _telling_row(cell: CellOutcome) -> tuple[str, ...]:
    judged = cell.decided_by
    change = "-"
    if judged is not None:
        change = f"{100 * (judged.ratio - 1):+.1f} %"
        if cell.verdict is Verdict.FASTER:
            change += f" (at most {100 * (judged.upper - 1):+.1f} %)"
        elif cell.verdict is not Verdict.SAME:
            change += f" (at least {100 * (judged.lower - 1):+.1f} %)"
    told = [cell.detail] if cell.detail else []
    told += [str(one) for one in cell.changes[:_TOLD]]
    if len(cell.changes) > _TOLD:
        told.append(f"and {len(cell.changes) - _TOLD} more counters")
    verdict = [] if cell.changes and cell.verdict in _CALM else [str(cell.verdict)]
    if cell.changes:
        verdict.append("counters changed")
    return f"{cell.group}: {cell.label}", change, ", ".join(verdict), "; ".join(told)


def _moved(one: Shown, outcome: Outcome) -> bool:
    """CPU time is never the same twice: it is told beyond the floor. Counts are told whenever they differ."""
    if one.old is None or one.new is None or not one.counter.endswith("CPU s"):
        return one.old != one.new
    return abs(one.new - one.old) > outcome.settings.floor * one.old


def _shown_row(cell: CellOutcome, one: Shown) -> tuple[str, ...]:
    return cell.group, cell.label, one.counter, _number(one.old), _number(one.new)


def _number(value: float | None) -> str:
    return "n/a" if value is None else f"{value:g}" if value < 1e6 else f"{value:.0f}"


def _settings(outcome: Outcome) -> str:
    facts = {
        "mode": outcome.mode,
        "settings": {
            "floor": outcome.settings.floor,
            "alpha": outcome.settings.alpha,
            "accept_counters": outcome.settings.accept_counters,
        },
        "options": dict(outcome.options),
        "fingerprint": dict(outcome.fingerprint),
    }
    return f"```json\n{json.dumps(facts, indent=2, default=str)}\n```"


def _folded(title: str, body: str) -> str:
    # The blank lines make GitHub read Markdown inside of HTML.
    return f"<details><summary>{_text(title)}</summary>\n\n{body}\n\n</details>"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *([_text(cell) for cell in cells] for cells in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _text(text: str) -> str:
    """One line that neither HTML nor a table's bars can break."""
    return html.escape(" ".join(text.split()), quote=False).replace("|", "\\|").replace("_", "\\_")
