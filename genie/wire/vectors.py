"""The vectors that go with a template, coded so that what both ends can foresee does not travel.

From one decode step to the next the same template runs with vectors that hardly differ: handles of
weights stay, handles of values move as far as the program's ``base`` does, sizes of a growing cache
grow evenly. Both ends therefore extrapolate from what the template last ran with, and a message
carries only the *residual*: nothing where the prediction holds.

    vector      literals (int64), floats (float64), externals (int64), releases (int64), in this
                order, seen as one vector of int64: floats by their bits
    prediction  last + (last - the one before it), modulo 2**64; a float: as last time; a handle that
                moved exactly as far as ``base`` did: as far as ``base`` does now. Where the releases
                are fewer than last time it is cut; none is made for more, nor after a change of the
                other lengths
    residual    empty: all as predicted. Else, little endian:
                4 x u32     lengths of literals, floats, externals, releases
                u32         n, the number of values that follow; 0xFFFFFFFF: the whole vector follows
                n x u32     their positions, ascending (all that have no prediction must be there)
                n x int64   the values
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from genie.errors import ProtocolError

_HEAD = struct.Struct("<5I")
_WHOLE = 0xFFFFFFFF
_LEAST, _MOST = -(1 << 63), (1 << 63) - 1


class Vectors(NamedTuple):
    """What one program runs with, beside its template."""

    literals: Sequence[int] = ()
    floats: Sequence[float] = ()
    ext: Sequence[int] = ()  # handles bound to the template's externals
    releases: Sequence[int] = ()  # handles to free after the program


class _Series:
    """One vector of ints: what it was last, and the steps of those values that are not constant."""

    __slots__ = ("last", "steps")

    def __init__(self) -> None:
        self.last: list[int] = []
        self.steps: list[tuple[int, int]] = []

    # Lists, and loops over what changes: the receiver needs lists, and for vectors of some hundred values
    # this decodes in a quarter of the time that arrays take.
    def predict(self, moved: int, moved_before: int) -> list[int]:
        """``moved_before`` is the step of values that followed the base, 0 where none can."""
        steps = self.steps
        if not steps:
            return self.last
        predicted = self.last.copy()
        for i, step in steps:
            value = predicted[i] + (moved if step == moved_before else step)
            predicted[i] = value if _LEAST <= value <= _MOST else _wrap(value)
        return predicted

    def observe(self, values: list[int], *, restart: bool) -> None:
        self.steps = (
            []
            if restart
            else [
                (i, _wrap(new - old))
                for i, (old, new) in enumerate(zip(self.last, values, strict=False))
                if new != old
            ]
        )
        self.last = values


class Predictor:
    """One end's memory of what a template ran with; `encode` and `decode` keep both ends' equal.

    A call that raises leaves it as it was. It keeps the lists that `decode` returns: do not change them.
    """

    __slots__ = ("_base", "_ext", "_floats", "_literals", "_moved", "_packed_floats", "_releases")

    def __init__(self) -> None:
        self._literals, self._ext, self._releases = _Series(), _Series(), _Series()
        self._floats: list[float] = []
        self._packed_floats = b""
        self._base = self._moved = 0  # and how far the base moved last time

    def __len__(self) -> int:
        """Values held."""
        return sum(map(len, self._last()))

    def encode(self, vectors: Vectors, base: int) -> bytes:
        """The residual of ``vectors``. Raises OverflowError for an int of more than 64 bits."""
        literals, floats, ext, releases = vectors
        predicted = self._predict(base)
        if (
            literals == predicted.literals
            and ext == predicted.ext
            and releases == predicted.releases
            and _layout((0, len(floats), 0, 0)).pack(*floats) == self._packed_floats
        ):
            self._follow(predicted, base)
            return b""
        lengths = _lengths(vectors)
        try:
            packed = _layout(lengths).pack(*literals, *floats, *ext, *releases)
        except struct.error as exc:
            raise OverflowError(f"an int of this program does not fit in 64 bits: {exc}") from exc
        residual = _residual(lengths, packed, self._foreseen(predicted, lengths))
        if lengths == _lengths(predicted) and len(residual) == _HEAD.size:
            residual = b""  # equal, but no lists of plain ints
        self._observe(lengths, packed, base)
        return residual

    def decode(self, residual: bytes, base: int) -> Vectors:
        """Raises ProtocolError for a residual that no `encode` made."""
        predicted = self._predict(base)
        if not residual:
            self._follow(predicted, base)
            return predicted
        lengths, packed = self._correct(residual, predicted)
        self._observe(lengths, packed, base)
        return self._last()

    def foresee(self, base: int) -> Vectors:
        """What `decode` would return for an empty residual; changes nothing."""
        return self._predict(base)

    def _last(self) -> Vectors:
        return Vectors(self._literals.last, self._floats, self._ext.last, self._releases.last)

    def _predict(self, base: int) -> Vectors:
        moved, before = _wrap(base - self._base), self._moved
        return Vectors(
            self._literals.predict(0, 0),
            self._floats,
            self._ext.predict(moved, before),
            self._releases.predict(moved, before),
        )

    def _follow(self, predicted: Vectors, base: int) -> None:
        """All came as predicted."""
        moved = _wrap(base - self._base)
        series = (self._literals, self._ext, self._releases)
        for one, values in zip(series, (predicted[0], predicted[2], predicted[3]), strict=True):
            if moved == self._moved:
                one.last = values  # type: ignore[assignment]
            else:
                one.observe(values, restart=False)  # type: ignore[arg-type]
        self._base, self._moved = base, moved

    def _observe(self, lengths: tuple[int, ...], packed: bytes, base: int) -> None:
        a, b, c, _ = lengths
        values = list(_layout(lengths).unpack(packed))
        restart = lengths[:3] != _lengths(self._last())[:3]
        self._literals.observe(values[:a], restart=restart)
        self._floats, self._packed_floats = values[a : a + b], packed[8 * a : 8 * (a + b)]
        self._ext.observe(values[a + b : a + b + c], restart=restart)
        self._releases.observe(values[a + b + c :], restart=restart)
        self._moved = _wrap(base - self._base)
        self._base = base

    def _foreseen(self, predicted: Vectors, lengths: tuple[int, ...]) -> bytes:
        """The first values of a vector of these lengths."""
        known = _lengths(predicted)
        if known[:3] != lengths[:3]:
            return b""
        literals, _, ext, releases = predicted
        ints = _layout((len(literals), 0, 0, 0)).pack(*literals)
        handles = _layout((0, 0, known[2], known[3])).pack(*ext, *releases)
        return (ints + self._packed_floats + handles)[: 8 * sum(lengths)]

    def _correct(self, residual: bytes, predicted: Vectors) -> tuple[tuple[int, ...], bytes]:
        """Lengths and values that a residual states. Nothing larger than it or than what is held is
        allocated."""
        if len(residual) < _HEAD.size:
            raise ProtocolError(f"the residual of a vector has {len(residual)} bytes: too few for its head")
        *sizes, given = _HEAD.unpack_from(residual)
        lengths = tuple(sizes)
        total = sum(lengths)
        body = len(residual) - _HEAD.size
        if body != (8 * total if given == _WHOLE else 12 * given):
            raise ProtocolError(f"the residual of a vector of {total} values has {body} bytes after its head")
        if given == _WHOLE:
            return lengths, residual[_HEAD.size :]
        foreseen = self._foreseen(predicted, lengths)
        known = len(foreseen) // 8
        positions = np.frombuffer(residual, "<u4", given, _HEAD.size).astype(np.int64)
        if given and (int(positions[-1]) >= total or not (positions[1:] > positions[:-1]).all()):
            raise ProtocolError(f"positions in a vector of {total} values are not ascending, or leave it")
        if given < total - known or (total > known and int(positions[known - total]) != known):
            raise ProtocolError(
                f"a vector of {total} values, of which {known} are foreseen, came with only {given}"
            )
        values = np.empty(total, "<i8")
        values[:known] = np.frombuffer(foreseen, "<i8")
        values[positions] = np.frombuffer(residual, "<i8", given, _HEAD.size + 4 * given)
        return lengths, values.tobytes()


def whole(vectors: Vectors) -> bytes:
    """A residual that states everything: it decodes to ``vectors`` whatever was before."""
    literals, floats, ext, releases = vectors
    lengths = _lengths(vectors)
    return _HEAD.pack(*lengths, _WHOLE) + _layout(lengths).pack(*literals, *floats, *ext, *releases)


def _residual(lengths: tuple[int, ...], packed: bytes, foreseen: bytes) -> bytes:
    values, known = np.frombuffer(packed, "<i8"), len(foreseen) // 8
    wrong = np.flatnonzero(values[:known] != np.frombuffer(foreseen, "<i8"))
    positions = np.concatenate([wrong, np.arange(known, len(values))])
    given = len(positions)
    if given and 12 * given >= 8 * len(values):
        return _HEAD.pack(*lengths, _WHOLE) + packed
    return _HEAD.pack(*lengths, given) + positions.astype("<u4").tobytes() + values[positions].tobytes()


def _lengths(vectors: Vectors) -> tuple[int, ...]:
    return tuple(map(len, vectors))


@lru_cache(maxsize=4096)
def _layout(lengths: tuple[int, ...]) -> struct.Struct:
    a, b, c, d = lengths
    return struct.Struct(f"<{a}q{b}d{c + d}q")


def _wrap(difference: int) -> int:
    """Modulo 2**64, as an int64."""
    return (difference + (1 << 63)) % (1 << 64) - (1 << 63)
