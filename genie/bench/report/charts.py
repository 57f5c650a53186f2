"""Small inline SVG: histogram, trend, sparkline, bars. Every colour is a class that the page's CSS sets.

Own functions, because pygal (which pytest-benchmark brings) was tried first: a bar chart of three bars
is 16 kB, 13 kB of it a stylesheet that is repeated in each chart, which would be megabytes for 35 cells;
it has no quartile band; and it puts coordinates into ``<desc>``, which a screen reader reads out.

A chart is as wide as a phone in its own units, so that its text stays readable there, and is scaled up
by CSS elsewhere. All text passes through `markupsafe`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup

from genie.bench.report import numbers

WIDTH = 360
LEFT, RIGHT = 52, 10
#: commit ids below a trend line that fit side by side
MOST_LABELS = 6
#: dots that one can still point at; more would be thousands of elements on a page, and are one path
MOST_DOTS = 25


@dataclass(frozen=True)
class TrendPoint:
    """A run on a trend line, in seconds."""

    label: str
    median_s: float
    q1_s: float
    q3_s: float
    told: str


@dataclass(frozen=True)
class ScatterPoint:
    """``x_s`` and ``y_s`` in seconds, above 0; its CSS class and what it says on hover."""

    x_s: float
    y_s: float
    kind: str
    told: str


@dataclass(frozen=True)
class Part:
    """A segment of a stacked bar: its CSS class, its length and what it says on hover."""

    kind: str
    value: float
    told: str


def histogram(samples_s: Sequence[float], median_s: float, told: Callable[[float], str]) -> Markup:
    """Counts per bin above, each raw sample as a tick below, and the median as a line."""
    counts, edges = np.histogram(samples_s, bins=_bins(samples_s))
    top, floor, height = 12, 104, 150
    low, high = float(edges[0]), float(edges[-1])
    most = int(counts.max())

    def x(value: float) -> float:
        return LEFT + (value - low) / (high - low) * (WIDTH - LEFT - RIGHT)

    def y(count: float) -> float:
        return floor - count / most * (floor - top)

    marks = [_line("grid", LEFT, y(most), WIDTH - RIGHT, y(most))]
    marks += [_text(LEFT - 6, y(most) + 4, str(most), "end"), _text(LEFT - 6, floor + 4, "0", "end")]
    for count, start, end in zip(counts, edges[:-1], edges[1:], strict=True):
        if count:
            marks.append(
                Markup(
                    '<rect class="bar" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}">'
                    "<title>{} from {} to {}</title></rect>"
                ).format(
                    x(start) + 0.5,
                    y(count),
                    max(1.0, x(end) - x(start) - 1),
                    floor - y(count),
                    _samples(int(count)),
                    told(start),
                    told(end),
                )
            )
    marks.append(_line("axis", LEFT, floor, WIDTH - RIGHT, floor))
    ticks = "".join(f"M{x(value):.1f} {floor + 4}v9" for value in samples_s)
    marks.append(Markup('<path class="rug" d="{}"/>').format(ticks))
    marks.append(_line("median", x(median_s), top - 8, x(median_s), floor + 15))
    marks.append(_text(LEFT, floor + 30, told(low), "start"))
    marks.append(_text(WIDTH - RIGHT, floor + 30, told(high), "end"))
    middle = x(median_s)
    if LEFT + 70 < middle < WIDTH - RIGHT - 70:
        marks.append(_text(middle, floor + 30, told(median_s), "middle"))
    desc = (
        f"{_samples(len(samples_s))} from {told(min(samples_s))} to {told(max(samples_s))}, "
        f"median {told(median_s)}"
    )
    return _svg("Latency histogram", desc, height, marks)


def trend(points: Sequence[TrendPoint], told: Callable[[float], str]) -> Markup:
    """The median by run as a line in a band from the first to the third quartile. Two points or more."""
    top, floor, height = 10, 118, 144
    low, high = min(p.q1_s for p in points), max(p.q3_s for p in points)
    ticks = _ticks(low, high)
    low, high = min(low, ticks[0]), max(high, ticks[-1])

    def x(index: int) -> float:
        return LEFT + 12 + index / (len(points) - 1) * (WIDTH - LEFT - RIGHT - 30)

    def y(value: float) -> float:
        return floor - (value - low) / (high - low) * (floor - top)

    marks = []
    for tick in ticks:
        marks.append(_line("grid", LEFT, y(tick), WIDTH - RIGHT, y(tick)))
        marks.append(_text(LEFT - 6, y(tick) + 4, told(tick), "end"))
    upper = " ".join(f"{x(i):.1f},{y(p.q3_s):.1f}" for i, p in enumerate(points))
    lower = " ".join(f"{x(i):.1f},{y(p.q1_s):.1f}" for i, p in reversed(list(enumerate(points))))
    marks.append(Markup('<polygon class="band" points="{} {}"/>').format(upper, lower))
    marks.append(_polyline([(x(i), y(p.median_s)) for i, p in enumerate(points)]))
    if len(points) <= MOST_DOTS:
        for index, point in enumerate(points):
            marks.append(
                Markup('<circle class="dot" cx="{:.1f}" cy="{:.1f}" r="3"><title>{}</title></circle>').format(
                    x(index), y(point.median_s), point.told
                )
            )
    else:
        dots = "".join(f"M{x(i):.1f} {y(p.median_s):.1f}h0" for i, p in enumerate(points))
        marks.append(Markup('<path class="dots" d="{}"/>').format(dots))
    named = min(len(points), MOST_LABELS)
    for index in {round(i * (len(points) - 1) / (named - 1)) for i in range(named)}:
        marks.append(_text(x(index), floor + 18, points[index].label, "middle", "commit"))
    first, last = points[0], points[-1]
    desc = (
        f"{len(points)} runs, from {told(first.median_s)} at {first.label} to {told(last.median_s)} at "
        f"{last.label}; the axis does not begin at zero"
    )
    return _svg("Median by run, with quartiles", desc, height, marks)


def sparkline(values_s: Sequence[float]) -> Markup:
    """The line alone; the table around it holds its figures."""
    width, height = 108, 26
    low, high = min(values_s), max(values_s)
    span = high - low or 1.0
    at = [
        (3 + i / max(1, len(values_s) - 1) * (width - 6), height - 4 - (v - low) / span * (height - 8))
        for i, v in enumerate(values_s)
    ]
    marks = [
        _polyline(at),
        Markup('<circle class="dot" cx="{:.1f}" cy="{:.1f}" r="2.5"/>').format(*at[-1]),
    ]
    return _small(width, height, marks)


def stacked(parts: Sequence[Part], total: float, mark: float | None = None) -> Markup:
    """Segments one after another, to a scale on which ``total`` is the whole width; a line at ``mark``."""
    width, height, at = 210, 18, 0.0
    marks = []
    for part in parts:
        length = part.value / total * (width - 2)
        if length >= 0.3:
            marks.append(
                Markup(
                    '<rect class="part {}" x="{:.1f}" y="3" width="{:.1f}" height="12">'
                    "<title>{}</title></rect>"
                ).format(part.kind, at, length, part.told)
            )
        at += length
    if mark is not None:
        where = mark / total * (width - 2)
        marks.append(_line("median", where, 0, where, height))
    return _small(width, height, marks)


def around_one(ratio: float, most: float) -> Markup:
    """A bar from 1.0 in the middle, to the right when slower; log scale, ``most`` at either end."""
    width, height = 96, 18
    middle = width / 2
    length = max(-1.0, min(1.0, math.log(ratio) / math.log(most))) * (middle - 2)
    kind = "slower" if ratio > 1 else "faster"
    marks = [
        Markup('<rect class="{}" x="{:.1f}" y="4" width="{:.1f}" height="10"/>').format(
            kind, min(middle, middle + length), max(0.8, abs(length))
        ),
        _line("axis", middle, 0, middle, height),
    ]
    return _small(width, height, marks)


def scatter(points: Sequence[ScatterPoint], title: str) -> Markup:
    """Both axes logarithmic and alike, from a power of ten to one, with the line on which both are equal."""
    values = [v for p in points for v in (p.x_s, p.y_s)]
    first, last = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    last = max(last, first + 1)
    top, side = 12, 288
    floor = top + side

    def x(value: float) -> float:
        return LEFT + (math.log10(value) - first) / (last - first) * side

    def y(value: float) -> float:
        return floor - (math.log10(value) - first) / (last - first) * side

    marks = []
    for power in range(first, last + 1):
        at, told = 10.0**power, numbers.seconds(10.0**power)
        marks.append(_line("grid", x(at), top, x(at), floor))
        marks.append(_line("grid", LEFT, y(at), LEFT + side, y(at)))
        marks.append(_text(x(at), floor + 14, told, "middle"))
        marks.append(_text(LEFT - 5, y(at) + 4, told, "end"))
    marks.append(_line("axis", LEFT, floor, LEFT + side, top))
    marks.append(_text(LEFT + side, floor + 30, "measured", "end"))
    marks.append(_text(LEFT + 4, top + 12, "predicted", "start"))
    for p in points:
        marks.append(
            Markup('<circle class="{}" cx="{:.1f}" cy="{:.1f}" r="3.5"><title>{}</title></circle>').format(
                p.kind, x(p.x_s), y(p.y_s), p.told
            )
        )
    return _svg(title, f"{len(points)} points, predicted above measured", floor + 36, marks)


def _bins(samples_s: Sequence[float]) -> np.ndarray:
    """numpy's "auto" rule (the finer of Sturges and Freedman-Diaconis), at most 40 bins."""
    edges = np.histogram_bin_edges(samples_s, bins="auto")
    if len(edges) > 41:
        edges = np.histogram_bin_edges(samples_s, bins=40)
    if max(samples_s) == min(samples_s):  # numpy would spread it over a whole second
        edges = np.array([samples_s[0] * 0.99, samples_s[0] * 1.01])
    return edges


def _ticks(low: float, high: float) -> list[float]:
    """Round values, 3 to 5 of them, over the span."""
    span = (high - low) or low * 0.1
    raw = span / 4
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= raw)
    first, last = math.floor(low / step), math.ceil((low + span) / step)
    return [index * step for index in range(first, last + 1)]


def _svg(title: str, desc: str, height: int, marks: Sequence[Markup]) -> Markup:
    return Markup(
        '<svg class="chart" viewBox="0 0 {} {}" role="img"><title>{}</title><desc>{}</desc>{}</svg>'
    ).format(WIDTH, height, title, desc, Markup("").join(marks))


def _small(width: int, height: int, marks: Sequence[Markup]) -> Markup:
    # Beside its own figures in a table: nothing to read out.
    return Markup(
        '<svg class="small" width="{0}" height="{1}" viewBox="0 0 {0} {1}" aria-hidden="true">{2}</svg>'
    ).format(width, height, Markup("").join(marks))


def _line(kind: str, x1: float, y1: float, x2: float, y2: float) -> Markup:
    return Markup('<path class="{}" d="M{:.1f} {:.1f}L{:.1f} {:.1f}"/>').format(kind, x1, y1, x2, y2)


def _polyline(points: Sequence[tuple[float, float]]) -> Markup:
    return Markup('<polyline class="line" points="{}"/>').format(
        " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    )


def _text(x: float, y: float, text: str, anchor: str, kind: str = "") -> Markup:
    return Markup('<text x="{:.1f}" y="{:.1f}" text-anchor="{}" class="{}">{}</text>').format(
        x, y, anchor, kind or "tick", text
    )


def _samples(number: int) -> str:
    return "1 sample" if number == 1 else f"{number} samples"
