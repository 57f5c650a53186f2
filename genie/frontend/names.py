"""What the weights of a session are called, and what `genie.annotate_phase` says of their modules.

Noted when a module moves to the device or loads its state, so that recording an op costs nothing for it:
an instruction that reads a weight is later told to be its module's by the weight's handle.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

import msgspec
from torch import nn

from genie.frontend.handle import UNRECORDED, Value
from genie.frontend.tensor import LazyTensor

#: where `genie.annotate_phase` leaves its phase: in the module, so that copies of the module have it too
HINT = "_genie_phase"
#: what `torch.compile(module)` puts around a module
_COMPILED = "_orig_mod"
#: blocks that are remembered where nothing plans the programs that they are in
_MOST_BLOCKS = 1024


class Owner(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """One place in a module tree where a weight is; a tied weight has several.

    ``root``: class of the module at the top, "Net#2" where the session has a second tree of that class.
    ``path``: qualified name of the tensor. ``lookup``: its module is an nn.Embedding. ``hint``: path and
    phase of the innermost annotated module around it.
    """

    root: str
    path: str
    parameter: bool
    lookup: bool = False
    hint: tuple[str, str] | None = None

    @property
    def module(self) -> str:
        return self.path.rpartition(".")[0]


class WeightNames:
    """Of one session, with its annotated blocks: instructions are counted through the session."""

    def __init__(self) -> None:
        self._owners: dict[int, tuple[weakref.ref[Value], tuple[Owner, ...]]] = {}
        self._roots: list[tuple[weakref.ref[nn.Module], str]] = []
        self._swept_at = 256
        self._hinted = False
        #: [first instruction, one after the last or None while it is open, phase], innermost last
        self._blocks: list[list[Any]] = []

    def of(self, handle: int) -> tuple[Owner, ...]:
        """The places of the weight with this handle; none where no module is known to hold it."""
        found = self._owners.get(handle)
        return () if found is None else found[1]

    def open_block(self, first: int, phase: str) -> list[Any]:
        """A block that begins with instruction ``first``. Those long past are forgotten."""
        self._blocks = [b for b in self._blocks[-_MOST_BLOCKS:] if b[1] is None or b[1] > b[0]]
        block = [first, None, phase]
        self._blocks.append(block)
        return block

    def close_block(self, block: list[Any], stop: int) -> None:
        block[1] = stop

    def within(self, first: int, count: int) -> tuple[tuple[int, int, str], ...]:
        """The blocks of ``count`` instructions from ``first`` on, counted from there."""
        return tuple(
            (max(start - first, 0), count if stop is None else min(stop - first, count), phase)
            for start, stop, phase in self._blocks
            if start < first + count and (stop is None or stop > first)
        )

    def hints(self, handles: list[int], first: int, count: int) -> tuple:
        """What a graph of a program depends on beside its template; () where nothing is annotated.
        Forgets the blocks that ended before the program."""
        if not (self._hinted or self._blocks):
            return ()
        self._blocks = [b for b in self._blocks if b[1] is None or b[1] > first]
        owners = {o.hint for h in handles for o in self.of(h) if o.hint is not None}
        blocks = self.within(first, count)
        return (frozenset(owners), blocks) if owners or blocks else ()

    def remember(self, module: nn.Module) -> None:
        """Notes the names of the module's weights in this session, as of the largest tree it is part of."""
        module = getattr(module, _COMPILED, module)
        self._roots = [(ref, label) for ref, label in self._roots if ref() is not None]
        below = set(module.modules())
        for ref, label in self._roots:
            root = ref()
            if root is not None and (root is module or (root not in below and _contains(root, module))):
                self._note(root, label)
                return
        self._roots = [(ref, label) for ref, label in self._roots if ref() not in below]
        label, taken = type(module).__name__, {label for _, label in self._roots}
        names = (label if k == 1 else f"{label}#{k}" for k in range(1, len(taken) + 2))
        label = next(name for name in names if name not in taken)
        self._roots.append((weakref.ref(module), label))
        self._note(module, label)

    def _note(self, root: nn.Module, label: str) -> None:
        found: dict[int, tuple[Value, list[Owner]]] = {}
        for tensor, owner in _places(root, label, "", None):
            value = tensor._h
            if value.rec.weight_names is self and value.gid != UNRECORDED:
                found.setdefault(value.gid, (value, []))[1].append(owner)
        for gid, (value, owners) in found.items():
            self._owners[gid] = (weakref.ref(value), tuple(owners))
            self._hinted = self._hinted or any(o.hint is not None for o in owners)
        if len(self._owners) > self._swept_at:
            self._owners = {gid: known for gid, known in self._owners.items() if known[0]() is not None}
            self._swept_at = 2 * len(self._owners) + 256


def _contains(root: nn.Module, module: nn.Module) -> bool:
    return any(m is module for m in root.modules())


def _places(
    module: nn.Module, root: str, path: str, hint: tuple[str, str] | None
) -> Iterator[tuple[LazyTensor, Owner]]:
    phase = module.__dict__.get(HINT)
    if phase is not None:
        hint = (path, phase)
    prefix = path + "." if path else ""
    lookup = isinstance(module, nn.Embedding)
    for tensors, is_parameter in ((module._parameters, True), (module._buffers, False)):
        for name, tensor in tensors.items():
            if isinstance(tensor, LazyTensor):
                yield tensor, Owner(root, prefix + name, is_parameter, lookup, hint)
    for name, child in module._modules.items():
        if child is not None:
            yield from _places(child, root, path if name == _COMPILED else prefix + name, hint)


def remember(module: nn.Module) -> None:
    """Notes the names of a module's weights in the sessions that hold them; does nothing for others."""
    seen: set[int] = set()
    for tensors in (module.parameters(), module.buffers()):
        for tensor in tensors:
            if isinstance(tensor, LazyTensor) and id(names := tensor._h.rec.weight_names) not in seen:
                seen.add(id(names))
                names.remember(module)
