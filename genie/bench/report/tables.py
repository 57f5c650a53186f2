"""What the page's tables are made of, and the classes of the heat map."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from genie.bench.report import numbers

#: upper ends of the classes "faster by" and "slower by", as ratios: within 5% is "the same"
STEPS = (1.05, 1.25, 2.0, 4.0, 10.0)


@dataclass(frozen=True)
class Td:
    """A table cell. ``value`` is what a column is sorted by; ``heat`` a class of the heat map."""

    text: str | Markup
    value: float | None = None
    kind: str = "num"
    heat: str = ""
    href: str = ""
    hint: str = ""


@dataclass(frozen=True)
class Table:
    """Rows in groups, each with a heading ("" for none). The first cell of a row is its heading."""

    id: str
    caption: str
    head: Sequence[str]
    groups: Sequence[tuple[str, Sequence[Sequence[Td]]]]
    sortable: bool = False
    kind: str = ""

    @property
    def columns(self) -> list[tuple[str, str]]:
        """Heading and alignment of each column, as its first row has it."""
        rows = [row for _, group in self.groups for row in group]
        kinds = [td.kind.split()[0] for td in rows[0]] if rows else ["text"] * len(self.head)
        return list(zip(self.head, kinds, strict=True))


def text(value: str | Markup, href: str = "") -> Td:
    return Td(value, kind="text", href=href)


def seconds(value: float | None) -> Td:
    return Td(numbers.seconds(value), value)


def milliseconds(value: float | None) -> Td:
    return Td(numbers.milliseconds(value), value)


def applicable(values_ms: Mapping[str, float], name: str) -> Td:
    """A time that not every row has."""
    return milliseconds(values_ms[name]) if name in values_ms else Td(numbers.DASH, hint="does not apply")


def size(value: float | None) -> Td:
    return Td(numbers.size(value), value, hint="" if value is None else f"{value:.0f} bytes")


def count(value: int | None) -> Td:
    return Td(numbers.count(value), value)


def ratio(value: float | None, href: str = "", hint: str = "") -> Td:
    """A ratio to a reference with its colour: above 1 is slower."""
    heat = "" if value is None else heat_class(value)
    return Td(numbers.times(value), value, kind="num heat", heat=heat, href=href, hint=hint)


def heat_class(value: float) -> str:
    """``same``, or ``slower1`` to ``slower5`` and ``faster1`` to ``faster5``: the same steps either way."""
    factor = value if value >= 1 else 1 / value
    for step, upper in enumerate(STEPS):
        if factor < upper:
            return "same" if step == 0 else f"{'slower' if value > 1 else 'faster'}{step}"
    return f"{'slower' if value > 1 else 'faster'}{len(STEPS)}"


def legend() -> list[tuple[str, str]]:
    """Class and meaning, from the fastest to the slowest."""
    spans = list(zip(STEPS, [*STEPS[1:], None], strict=True))

    def told(low: float, high: float | None) -> str:
        return f"over {low:g}{numbers.TIMES}" if high is None else f"{low:g} to {high:g}{numbers.TIMES}"

    slower = [(f"slower{i}", f"{told(*span)} slower") for i, span in enumerate(spans, 1)]
    faster = [(f"faster{i}", f"{told(*span)} faster") for i, span in enumerate(spans, 1)]
    return [*reversed(faster), ("same", "within 5%"), *slower]
