"""The state of a proof: where the batch lies in each value, as far as instructions were read.

A whole value may be blown up to as many rows as the batch has by a literal (``zeros(B, T)``, an
``expand``). Whether such a literal means the batch shows only later, where the value meets one. So each
such dimension has a *variable*: true if its rows are the batch's, false if not. What meets along one
dimension must agree (`Proof.unite`); what an instruction reads as a whole is false (`Proof.whole`); what
nothing has made true in the end is false. Each rule then holds for whichever value the variables take.

A *tag* (variable, dimension) of a value says: if the variable is true, the value's rows lie along the
dimension. All rows have the same number of elements, so a dimension of n elements has n / size each.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from genie.srg.graph import Graph, Node

TRUE, FALSE = 0, 1

_LISTS = ("il", "fl", "tl")
Tags = tuple[tuple[int, int], ...]


class Refused(Exception):
    """There is no proof; the text says why."""


class Slot(NamedTuple):
    """An argument of an instruction: its pattern (see `OpDef`), and where what fills it begins."""

    kind: str
    payload: Any
    literal: int
    float: int
    tensor: int
    width: int  # how many literals or tensors it takes


class Proof:
    """``shape``: of every value so far. ``tags``: of the values that have any. ``mixed``: values of no
    dimensions that depend on all rows, with the reason: nothing that leaves may depend on them.
    ``counters``: values that hold the number of the row (``arange(B)``). ``scaled``: (variable,
    instruction, literal, elements per row)."""

    def __init__(self, graph: Graph, size: int) -> None:
        self.graph = graph
        self.size = size
        self.shape: dict[int, list[int]] = {}
        self.state: dict[int, Tags] = {}
        self.mixed: dict[int, str] = {}
        self.counters: set[int] = set()
        self.scaled: list[tuple[int, int, int, int]] = []
        self.root: dict[int, int] = {}  # of views: the value that owns their storage
        self._parent = [TRUE, FALSE]
        self._along = [((TRUE, dim),) for dim in range(8)]
        self._why: dict[int, str] = {}  # of a variable that became false
        self._slots: dict[tuple[int, int], tuple[list[Slot], dict[str, Slot]]] = {}

    # Variables

    @property
    def variables(self) -> int:
        return len(self._parent)

    def variable(self) -> int:
        self._parent.append(len(self._parent))
        return len(self._parent) - 1

    def find(self, variable: int) -> int:
        parent = self._parent
        while parent[variable] != variable:
            variable = parent[variable]
        return variable

    def whole(self, variable: int, node: Node, why: str) -> None:
        """``node`` needs all rows: refused for the batch itself."""
        root = self.find(variable)
        if root == TRUE:
            raise refused(node, why)
        if root != FALSE:
            self._parent[root] = FALSE
            self._why[root] = f"instruction {node.number} {node.op} {why}"

    def unite(self, a: int, b: int, node: Node) -> int:
        """``node`` needs the rows of both to be the same rows."""
        x, y = self.find(a), self.find(b)
        if x == y:
            return x
        low, high = (x, y) if x < y else (y, x)
        if high == FALSE:
            raise refused(node, f"meets the batch with a value that {self._reason(a if x == FALSE else b)}")
        self._parent[high] = low
        if low == FALSE:
            self._why[high] = f"instruction {node.number} {node.op} meets it with a whole value"
        return low

    def _reason(self, variable: int) -> str:
        """Why it is false."""
        while self._parent[variable] != FALSE:
            variable = self._parent[variable]
        return f"is not split, because {self._why[variable]}"

    def _was_read_whole(self, value: int, dim: int) -> str:
        for variable, d in self.state.get(value, ()):
            if d == dim and variable != FALSE and self.find(variable) == FALSE:
                return ": it " + self._reason(variable)
        return ""

    # Values

    def tags(self, value: int) -> Tags:
        """Without those known to be false."""
        tags = self.state.get(value)
        if tags is None:
            return ()
        if len(tags) == 1 and tags[0][0] == TRUE:
            return tags
        found = [(self.find(variable), dim) for variable, dim in tags]
        return tuple([t for t in found if t[0] != FALSE])

    def along(self, tags: list[tuple[int, int]]) -> Tags:
        """As a tuple. Those of the batch alone are shared: thousands of new objects would set off Python's
        collector, which walks over all of torch."""
        if len(tags) == 1 and tags[0][0] == TRUE and tags[0][1] < 8:
            return self._along[tags[0][1]]
        return tuple(tags)

    def tag(self, value: int, tags: Tags, node: Node) -> None:
        """A value has one batch dimension at most: beside a true one, all others are false."""
        if not tags:
            return
        if len(tags) > 1:
            true = [t for t in tags if self.find(t[0]) == TRUE]
            if true:
                for variable, dim in tags:
                    if (variable, dim) != true[0]:
                        self.whole(variable, node, "has the batch in two dimensions of one result")
                tags = (true[0],)
        self.state[value] = tags

    def candidate(self, node: Node, literal: int, per_row: int) -> int:
        """A new variable that is true if this literal means the batch."""
        variable = self.variable()
        self.scaled.append((variable, node.number, literal, per_row))
        return variable

    def all_whole(self, node: Node, values: Sequence[int], why: str) -> None:
        for value in values:
            for variable, _ in self.tags(value):
                self.whole(variable, node, why)

    def random(self, node: Node) -> None:
        """Parts would draw other numbers than the whole does, even for what does not depend on the batch."""
        raise refused(node, "draws random numbers")

    def join(
        self, node: Node, operands: Sequence[tuple[int, Sequence[int]]], why: str, broadcast: bool = True
    ) -> Tags:
        """Tags of a result of which each row depends on the same rows of the operands alone.

        ``operands``: values with the result's dimension for each of theirs, or -1 for a dimension that
        the instruction needs whole (``why``). ``broadcast``: one of size 1 goes with any.
        """
        with_tags = [k for k, (value, _) in enumerate(operands) if value in self.state]
        if len(with_tags) == 1:  # the common case: one operand has the batch
            value, labels = operands[with_tags[0]]
            tags = self.state[value]
            if len(tags) == 1 and tags[0][0] == TRUE:
                label = labels[tags[0][1]]
                if label < 0:
                    raise refused(node, why)
                if not any(
                    label in others and (not broadcast or self.shape[v][others.index(label)] != 1)
                    for v, others in operands
                    if v != value
                ):
                    return self.along([(TRUE, label)])
        found: dict[int, int] = {}
        sizes: dict[int, int] = {}
        tagged: set[tuple[int, int]] = set()
        counts = [0] * len(operands)
        for k, (value, labels) in enumerate(operands):
            for variable, dim in self.tags(value):
                label = labels[dim]
                if label < 0:
                    self.whole(variable, node, why)
                    continue
                n = self.shape[value][dim]
                if sizes.setdefault(label, n) != n:
                    self.whole(variable, node, f"meets {n} with {sizes[label]} rows of the batch")
                    continue
                known = found.get(label)
                if known != variable:
                    found[label] = variable if known is None else self.unite(known, variable, node)
                tagged.add((k, dim))
                counts[k] += 1
        if not found:
            return ()
        for k, (value, labels) in enumerate(operands):
            if counts[k] == len(found):
                continue  # it has all of these dimensions, and the batch along each
            shape = self.shape[value]
            for dim, label in enumerate(labels):
                if label in found and (k, dim) not in tagged and (shape[dim] != 1 or not broadcast):
                    why = f"meets the batch with a value of {shape[dim]} rows of its own"
                    self.whole(found.pop(label), node, why + self._was_read_whole(value, dim))
        return self.along([(self.find(variable), label) for label, variable in found.items()])

    def is_mask(self, value: int) -> bool:
        """Is it bool or uint8? As an index these select, and do not count."""
        spec = self.graph.wiring.spec[value]
        return spec is not None and spec.dtype in ("bool", "uint8")

    # Arguments

    def slot(self, node: Node, position: int, name: str = "") -> Slot | None:
        """The argument at ``position``, or called ``name``; None where it is absent or None."""
        key = (id(node.args), id(node.kwargs))
        found = self._slots.get(key)
        if found is None:
            found = self._slots[key] = _slots(node)
        positional, named = found
        slot = positional[position] if 0 <= position < len(positional) else named.get(name)
        return None if slot is None or slot.kind == "n" else slot

    def ints(self, node: Node, position: int, name: str = "") -> tuple[int, ...] | None:
        """None for an argument that is absent, or of another kind."""
        slot = self.slot(node, position, name)
        if slot is None or slot.kind not in ("i", "il"):
            return None
        return node.literals[slot.literal : slot.literal + slot.width]

    def flag(self, node: Node, position: int, name: str = "") -> bool:
        slot = self.slot(node, position, name)
        return slot is not None and bool(slot.payload)

    def values(self, node: Node, position: int, name: str = "") -> tuple[int, ...]:
        """The tensors of an argument."""
        slot = self.slot(node, position, name)
        return () if slot is None else node.inputs[slot.tensor : slot.tensor + slot.width]


def refused(node: Node, why: str) -> Refused:
    return Refused(f"instruction {node.number} {node.op} {why}")


def _slots(node: Node) -> tuple[list[Slot], dict[str, Slot]]:
    literal = number = tensor = width = 0
    slots: list[Slot] = []
    for pattern in (*node.args, *node.kwargs.values()):
        kind: str = pattern[0]
        payload: Any = pattern[1] if len(pattern) > 1 else None
        at = literal, number, tensor
        width = (
            1
            if kind in ("i", "f", "t")
            else sum(payload)
            if kind == "ol"
            else payload
            if kind in _LISTS
            else 0
        )
        literal += width if kind in ("i", "il") else 0
        number += width if kind in ("f", "fl") else 0
        tensor += width if kind in ("t", "tl", "ol") else 0
        slots.append(Slot(kind, payload, *at, width))
    positional = slots[: len(node.args)]
    return positional, dict(zip(node.kwargs, slots[len(node.args) :], strict=True))
