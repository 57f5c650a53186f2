"""Whether a program would index within bounds, found out before it runs.

On a GPU an index that is out of bounds ends the process that holds it, with all its sessions. A client that
asked for that gets what it asked for; a program that nobody asked for yet must not. So its indices are
computed first, on the host: in what runs token by token they are made of a few small values (the last token's
id, its position), by a few ops on integers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from genie.server.engine import Template
from genie.server.engines.kv import Value, as_tensor
from genie.server.ops import CompiledOp

#: instructions that may be computed on the host, and elements of an external that may be copied there
MAX_INSTRUCTIONS = 64
MAX_ELEMENTS = 1 << 16

#: ops whose indices are checked: the positions of what is indexed, of the dimension (None: the first), and
#: of the indices among their arguments; whether negative ones count from the end
_KNOWN = {
    "aten::embedding.default": (0, None, 1, False),
    "aten::index_select.default": (0, 1, 2, False),
    "aten::gather.default": (0, 1, 2, False),
    "aten::index.Tensor": (0, None, 1, True),
}
#: in the names of ops that check indices, or anything else, on the device
_CHECKING = (
    "index", "gather", "scatter", "take", "put", "embedding", "nll_loss", "cross_entropy", "one_hot",
    "_assert", "unpool", "bincount", "ctc_loss", "margin",
)  # fmt: skip


class Bounds:
    """Of one template. ``provable``: whether `hold` can tell at all."""

    def __init__(self, template: Template) -> None:
        self._template = template
        self._checks: list[int] = []
        self.provable = True
        made = {slot: i for i, (_, _, new) in enumerate(template.instructions) for slot in new}
        wanted: list[int] = []
        for i, (op, reads, _) in enumerate(template.instructions):
            if op.name in _KNOWN:
                self._checks.append(i)
                wanted += reads
            elif any(part in op.name for part in _CHECKING):
                self.provable = False
        if self._checks and any(op.written for op, _, _ in template.instructions):
            self.provable = False  # an index may be written to in place
        #: instructions that make indices or what is indexed, in order
        needed: set[int] = set()
        while wanted and len(needed) <= MAX_INSTRUCTIONS:
            instruction = made.get(wanted.pop())
            if instruction is not None and instruction not in needed:
                needed.add(instruction)
                wanted += template.instructions[instruction][1]
        self._needed = sorted(needed)
        #: of each that matters: which ints and floats are its first
        self._starts: dict[int, tuple[int, int]] = {}
        n_ints = n_floats = 0
        for i, (op, _, _) in enumerate(template.instructions):
            if i in needed or op.name in _KNOWN:
                self._starts[i] = (n_ints, n_floats)
            n_ints, n_floats = n_ints + op.n_ints, n_floats + op.n_floats
        if len(needed) > MAX_INSTRUCTIONS or any(self._is_unfit(i) for i in needed):
            self.provable = False

    def _is_unfit(self, instruction: int) -> bool:
        op = self._template.instructions[instruction][0]
        return bool(op.written or op.random or op.nested or op.target is None or op.name in _KNOWN)

    def hold(self, ext: Sequence[Value], literals: Sequence[int], floats: Sequence[float]) -> bool:
        """Whether all indices of a run with these are within bounds; False where that cannot be told."""
        if not self._checks:
            return self.provable
        if not self.provable:
            return False
        run = _OnHost(self._template, self._starts, ext, literals, floats)
        for i in self._needed:
            if not run.compute(i):
                return False
        return all(run.is_within(i) for i in self._checks)


class _OnHost:
    """Some instructions of a program, computed on the CPU."""

    def __init__(
        self,
        template: Template,
        starts: dict[int, tuple[int, int]],
        ext: Sequence[Value],
        literals: Sequence[int],
        floats: Sequence[float],
    ) -> None:
        self._template, self._starts, self._ext = template, starts, ext
        self._literals, self._floats = literals, floats
        self._values: dict[int, Tensor] = {}

    def _value(self, slot: int) -> Tensor | None:
        """On the CPU; None for one that is too large."""
        value = self._values.get(slot)
        if value is None:
            if slot >= 0:
                return None
            value = as_tensor(self._ext[-slot - 1])
            if value.numel() > MAX_ELEMENTS:
                return None
            value = self._values[slot] = value.cpu()
        return value

    def _shape(self, slot: int) -> Sequence[int]:
        return self._values[slot].shape if slot in self._values else self._ext[-slot - 1].shape

    def compute(self, instruction: int) -> bool:
        op, reads, new = self._template.instructions[instruction]
        tensors = [self._value(slot) for slot in reads]
        if any(t is None for t in tensors):
            return False
        args, kwargs = self._arguments(instruction, op, tensors)
        made = op.target(*args, **kwargs)
        for slot, value in zip(new, [made] if op.single else made, strict=True):
            self._values[slot] = value
        return True

    def _arguments(self, instruction: int, op: CompiledOp, tensors: Sequence[Any]) -> tuple[list, dict]:
        i, f = self._starts[instruction]
        ints = iter(self._literals[i : i + op.n_ints])
        floats = iter(self._floats[f : f + op.n_floats])
        given = iter(tensors)
        sources = {"t": given, "i": ints, "f": floats}

        def one(kind: str, payload: Any) -> Any:
            if kind in ("t", "i", "f"):
                return next(sources[kind])
            if kind in ("tl", "il", "fl"):
                return [next(sources[kind[0]]) for _ in range(payload)]
            if kind == "ol":
                return [next(given) if present else None for present in payload]
            return torch.device("cpu") if isinstance(payload, torch.device) else payload

        return [one(*p) for p in op.args], {key: one(*p) for key, p in op.kwargs}

    def is_within(self, instruction: int) -> bool:
        op, reads, _ = self._template.instructions[instruction]
        indexed, dim_at, indices_at, negative = _KNOWN[op.name]
        if op.kwargs:
            return False
        # In place of tensors their slots.
        args, _ = self._arguments(instruction, op, reads)
        shape = self._shape(args[indexed])
        indices = args[indices_at]
        if not isinstance(indices, list):
            pairs = [(0 if dim_at is None else args[dim_at], indices)]
        else:
            pairs = [(dim, slot) for dim, slot in enumerate(indices) if slot is not None]
        for dim, slot in pairs:
            index = self._value(slot)
            if index is None or index.dtype not in (torch.int64, torch.int32):
                return False
            if index.numel():
                least, most = map(int, index.aminmax())
                size = shape[dim]
                if most >= size or least < (-size if negative else 0):
                    return False
        return True
