"""What a check finds, and what a check is."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from genie.errors import GenieError

OK, WARNING, PROBLEM, NOT_APPLICABLE = "ok", "warning", "problem", "not applicable"

#: what a check may raise: a library that is absent, broken or not for this machine, and the system's refusals
EXPECTED = (ImportError, OSError, RuntimeError, GenieError)


@dataclass(frozen=True)
class Finding:
    """``status`` is one of the four above; a warning and a problem say in ``remedy`` what to do."""

    name: str
    status: str
    found: str
    remedy: str = ""


def ok(name: str, found: str) -> Finding:
    return Finding(name, OK, found)


def warning(name: str, found: str, remedy: str) -> Finding:
    return Finding(name, WARNING, found, remedy)


def problem(name: str, found: str, remedy: str) -> Finding:
    return Finding(name, PROBLEM, found, remedy)


def not_applicable(name: str, found: str) -> Finding:
    return Finding(name, NOT_APPLICABLE, found)


@dataclass(frozen=True)
class Request:
    """What the user asked for. ``profile`` None: the one that the suite would choose."""

    full: bool = False
    port: int | None = None
    profile: str | None = None


@dataclass(frozen=True)
class Check:
    """``run`` yields at least one finding. ``needs`` are modules without which it says nothing new.

    ``remedy`` is for a check that raises one of `EXPECTED`.
    """

    name: str
    run: Callable[[Request], Iterator[Finding]]
    remedy: str
    needs: tuple[str, ...] = ()


def findings_of(check: Check, request: Request) -> list[Finding]:
    """A check that raises is a problem, beside what it had found before."""
    for module in check.needs:
        try:
            importlib.import_module(module)
        except EXPECTED as error:
            return [not_applicable(check.name, f"needs {module}, which cannot be imported ({_told(error)})")]
    found: list[Finding] = []
    try:
        found.extend(check.run(request))
    except EXPECTED as error:
        found.append(problem(check.name, _told(error), check.remedy))
    return found


def _told(error: BaseException) -> str:
    """Type and message; of a server's log only the end, where its error stands."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    text = lines[0] if len(lines) < 2 else f"{lines[0]} [...] {lines[-1]}" if lines else ""
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
