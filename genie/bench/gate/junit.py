"""The decision as JUnit XML, as CI systems read it: one test case per cell."""

from __future__ import annotations

import re
from xml.etree import ElementTree

from genie.bench.gate.outcome import CellOutcome, Outcome, Verdict
from genie.bench.gate.terminal import counters_remedy, verdict_line

#: what XML 1.0 has no way to write (an error may quote terminal colours)
_NOT_XML = re.compile(r"[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def junit(outcome: Outcome) -> bytes:
    """``time`` of a case is the new side's median in seconds."""
    suite = ElementTree.Element("testsuite", name="genie gate")
    failures = 0
    for cell in outcome.cells:
        case = ElementTree.SubElement(
            suite,
            "testcase",
            classname=_clean(cell.group),
            name=_clean(cell.label),
            time=f"{cell.new_s or 0:.6f}",
        )
        failed = _failures(cell, outcome)
        if failed:
            # One element a case: readers of this format take no more.
            kind = ", ".join(name for name, _ in failed)
            told = "\n".join(message for _, message in failed)
            failures += 1
            ElementTree.SubElement(
                case, "failure", type=kind, message=_clean(f"{kind}: {told}")
            ).text = _clean(f"{cell.id}\n{told}")
        ElementTree.SubElement(case, "system-out").text = _clean(_told(cell))
    if outcome.error:
        case = ElementTree.SubElement(suite, "testcase", classname="genie gate", name="compare", time="0")
        ElementTree.SubElement(case, "error", type="cannot compare", message=_clean(outcome.error))
    suite.set("tests", str(len(suite)))
    suite.set("failures", str(failures))
    suite.set("errors", str(int(bool(outcome.error))))
    suite.set("skipped", "0")
    suite.set("time", f"{outcome.wall_s:.3f}")
    ElementTree.SubElement(suite, "system-out").text = _clean(verdict_line(outcome))
    suites = ElementTree.Element("testsuites", name="genie gate")
    suites.append(suite)
    ElementTree.indent(suites)
    text: bytes = ElementTree.tostring(suites, encoding="utf-8", xml_declaration=True)
    return text + b"\n"


def _failures(cell: CellOutcome, outcome: Outcome) -> list[tuple[str, str]]:
    found = []
    if cell.verdict is Verdict.MISSING:
        found.append(("missing", cell.detail))
    if cell.verdict is Verdict.SLOWER:
        found.append(("regression", _told(cell)))
    if cell.changes and not outcome.settings.accept_counters:
        changes = "\n".join(map(str, cell.changes))
        found.append(("counters changed", f"{changes}\n{counters_remedy(outcome)}"))
    return found


def _told(cell: CellOutcome) -> str:
    judged = cell.decided_by
    if judged is None:
        return f"{cell.verdict}: {cell.detail}" if cell.detail else str(cell.verdict)
    figures = f"ratio {judged.ratio:.3f}, at least {judged.lower:.3f}, p {judged.p_slower:.3g}"
    return f"{cell.verdict}: {figures}" + (f"; {cell.detail}" if cell.detail else "")


def _clean(text: str) -> str:
    return _NOT_XML.sub("?", text)
