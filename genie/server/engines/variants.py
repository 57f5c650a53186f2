"""What one template is specialised for, and whether a call is of that kind."""

from __future__ import annotations

import weakref
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, fx

from genie.server.engines.kv import Growth, State, Value
from genie.server.engines.masks import Masks
from genie.server.engines.specialize import Observation


class Geometry(NamedTuple):
    """Of a tensor, with stride 0 in dimensions of size 1: what stands there means nothing."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, value: Value) -> Geometry:
        if isinstance(value, State):
            value = value.view()
        shape, stride = tuple(value.shape), value.stride()
        if 1 in shape:
            stride = tuple(0 if n == 1 else s for n, s in zip(shape, stride, strict=True))
        return cls(shape, stride, value.dtype)

    def matches(self, value: Value) -> bool:
        return isinstance(value, Tensor) and Geometry.of(value) == self


class Call(NamedTuple):
    """What a template runs with."""

    values: Sequence[Value]  # of its externals
    literals: Sequence[int]
    floats: Sequence[float]


def bits(floats: Sequence[float]) -> bytes:
    """What tells floats apart: 0.0 from -0.0, and not NaN from itself."""
    return array("d", floats).tobytes()


class Differences(NamedTuple):
    """Between two calls: numbers of the ints that differ, and of the externals whose geometry does."""

    literals: set[int]
    externals: set[int]


class Remembered:
    """A call, without its tensors, and what was seen when it ran."""

    def __init__(self, call: Call, seen: Observation) -> None:
        self.seen = seen
        self.literals, self.floats = list(call.literals), list(call.floats)
        self._bits = bits(call.floats)
        self.refs = [None if isinstance(v, State) else weakref.ref(v) for v in call.values]
        self.geometries = [Geometry.of(v) for v in call.values]

    def differences(self, call: Call) -> Differences | None:
        """None for calls that are not of a kind: another number of ints or dimensions, or other floats."""
        if self._bits != bits(call.floats) or len(self.literals) != len(call.literals):
            return None
        pairs = zip(self.literals, call.literals, strict=True)
        literals = {i for i, (a, b) in enumerate(pairs) if a != b}
        externals: set[int] = set()
        for i, (ref, before, value) in enumerate(zip(self.refs, self.geometries, call.values, strict=True)):
            if ref is not None and ref() is value:
                continue
            now = Geometry.of(value)
            if now != before:
                if now.dtype is not before.dtype or len(now.shape) != len(before.shape):
                    return None
                externals.add(i)
        return Differences(literals, externals)


@dataclass
class Specialised:
    """A rewritten program. Its placeholders: the externals, then the masks that are made beside it."""

    graph: fx.Graph
    growths: list[Growth]
    masks: Masks | None
    inputs: list[int]  # numbers of the externals that differ from run to run; no caches


class Engine(Protocol):
    """Runs one specialised program."""

    name: str
    #: whether externals that are no inputs must be where they were when it was made
    reads_in_place: bool

    @property
    def compiled(self) -> bool:
        """Whether the run before ran compiled code."""

    def run(self, call: Call) -> list[Value | None] | None:
        """The kept values; None where the call does not fit after all. Raises CaptureError, torch's
        OutOfMemoryError, or what the program raises."""


@dataclass
class Variant:
    """An engine with the kind of calls that it is for."""

    literals: list[int | None]  # None: whatever it is
    floats: bytes  # see `bits`
    varying: tuple[int, ...]  # numbers of the ints that are None
    bound: list[tuple[int, weakref.ref, Geometry]]  # externals that were the same tensor twice
    inputs: list[tuple[int, Geometry]]
    engine: Engine
    counters: dict[str, int]
    verified: bool = False  # it gave what the eager engine gave, once
    seconds: list[float] = field(default_factory=list)

    def fits(self, call: Call) -> bool:
        literals = call.literals
        if self.varying and len(literals) == len(self.literals):
            literals = list(literals)
            for i in self.varying:
                literals[i] = None  # type: ignore[call-overload]
        if self.literals != literals or self.floats != bits(call.floats):
            return False
        values = call.values
        for i, ref, geometry in self.bound:
            value = values[i]
            if ref() is not value and (self.engine.reads_in_place or not geometry.matches(value)):
                return False
        return all(geometry.matches(values[i]) for i, geometry in self.inputs)
