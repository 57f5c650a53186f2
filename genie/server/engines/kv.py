"""KV caches in place: a program that returns ``cat(past, new)`` writes into a preallocated buffer instead.

    growth      past -- cat(dim=-2) --> grown, which is kept, and read by attention of one query a row alone
    buffer      (batch, heads, capacity, width) for each growth; what lies behind the length is no part of it
    state       what a handle on ``grown`` is bound to: (buffer, length). It becomes a tensor of its own, laid
                out as ``cat`` would have made it, as soon as anything else reads it (`State.take`).

Why this is safe: a step of length n writes to position n only, and runs only where no living state of the
same buffers is longer than n; so nothing that a handle stands for is ever written to. Two continuations of
one past (a beam, a second try) therefore get buffers of their own, because the first one's state is alive.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from genie.server.engines.specialize import Spec

aten = torch.ops.aten
#: lengths that caches are allocated for: the next of these, then the next multiple of the last
CAPACITIES = (256, 512, 1024, 2048, 4096)


def capacity_for(length: int) -> int:
    """Positions to allocate so that a cache of ``length`` can grow by at least one."""
    for capacity in CAPACITIES:
        if length < capacity:
            return capacity
    step = CAPACITIES[-1]
    return (length // step + 1) * step


@dataclass(frozen=True)
class Growth:
    """External ``past`` grows by what the program makes and is kept as value ``kept``."""

    past: int  # number of the external
    kept: int  # number among the kept values
    spec: Spec  # of the past in the observed run
    grown: Spec

    def takes(self, past: Value) -> bool:
        """Whether it is one like the observed one, but for its length."""
        tensor = past if isinstance(past, Tensor) else past.view()
        return (
            tensor.dtype is self.spec.dtype
            and tensor.ndim == 4
            and all(tensor.shape[d] == self.spec.shape[d] for d in (0, 1, 3))
        )


class Buffers:
    """Those of one generation at a time: one for each growth, of (batch, heads, capacity, width)."""

    def __init__(self, growths: Sequence[Growth], capacity: int, device: torch.device) -> None:
        self.growths = growths
        self.capacity = capacity
        self.tensors: list[Tensor] = []
        for g in growths:
            batch, heads, _, width = g.spec.shape
            # Zeros: a position that was never written to is masked, but 0 * NaN would be NaN.
            self.tensors.append(
                torch.zeros((batch, heads, capacity, width), dtype=g.spec.dtype, device=device)
            )
        #: as `cat` lays out its results: dimensions from the outermost in
        self.orders = [sorted(range(4), key=lambda d, g=g: -g.grown.stride[d]) for g in growths]  # type: ignore[misc]
        self.steps: weakref.WeakSet[Step] = weakref.WeakSet()
        #: what an engine that owns them remembers of them
        self.owner: weakref.ref[Any] | None = None

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.tensors)

    @property
    def length(self) -> int:
        """Of the longest living state; 0 when they are free."""
        return max((s.length for s in list(self.steps)), default=0)

    def load(self, past: Sequence[Tensor | State]) -> None:
        """Copies the pasts into the buffers. Behind them are zeros: what another generation left there is
        masked, but a NaN of it would not be."""
        length = past[0].shape[2]
        if length < self.capacity:
            torch._foreach_zero_([b.narrow(2, length, self.capacity - length) for b in self.tensors])
        torch._foreach_copy_(
            [b.narrow(2, 0, length) for b in self.tensors],
            [p if isinstance(p, Tensor) else p.view() for p in past],
        )


class Step:
    """One length of the caches in one set of buffers; alive as long as a state of it is."""

    __slots__ = ("__weakref__", "buffers", "length")

    def __init__(self, buffers: Buffers, length: int) -> None:
        self.buffers, self.length = buffers, length
        buffers.steps.add(self)


class State:
    """What a handle on a grown cache is bound to."""

    __slots__ = ("_taken", "index", "step")

    def __init__(self, step: Step, index: int) -> None:
        self.step: Step | None = step  # None once a tensor was made of it
        self.index = index
        self._taken: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int, int, int]:
        batch, heads, length, width = self.view().shape
        return batch, heads, length, width

    @property
    def nbytes(self) -> int:
        """Of the tensor that it stands for."""
        return self.view().nbytes

    def view(self) -> Tensor:
        step = self.step  # once: another thread may ask for the size
        return self.take() if step is None else step.buffers.tensors[self.index].narrow(2, 0, step.length)

    def take(self) -> Tensor:
        """A tensor of its own, laid out as ``cat`` makes it. The same each time: views of it may be kept."""
        if self._taken is None:
            assert self.step is not None
            order = self.step.buffers.orders[self.index]
            inverse = sorted(range(4), key=order.__getitem__)
            dense = self.view().permute(order).clone(memory_format=torch.contiguous_format)
            self._taken, self.step = dense.permute(inverse), None
        return self._taken


Value = Tensor | State


def as_tensor(value: Value) -> Tensor:
    return value if isinstance(value, Tensor) else value.take()


def growths_of(graph: fx.Graph) -> list[Growth]:
    """All growths of the program, or none: one that cannot be done in place spoils the others."""
    placeholders = [n for n in graph.nodes if n.op == "placeholder"]
    kept = list(graph.output_node().args[0])  # type: ignore[arg-type]
    found: list[Growth] = []
    for node in graph.nodes:
        if node.target is not aten.cat.default or not _is_growth(node, kept):
            continue
        past = node.args[0][0]
        found.append(Growth(placeholders.index(past), kept.index(node), past.meta["spec"], node.meta["spec"]))
    attended = {v for n in graph.nodes if attends(n) for v in n.args[1:3]}
    if not found or {kept[g.kept] for g in found} - attended or len({g.spec.shape[2] for g in found}) != 1:
        return []
    return found


def _is_growth(node: fx.Node, kept: list) -> bool:
    parts: Any = node.args[0]
    spec: Spec | None = node.meta.get("spec")
    dim = node.args[1] if len(node.args) > 1 else 0
    if not isinstance(parts, (list, tuple)) or len(parts) != 2 or spec is None or len(spec.shape) != 4:
        return False
    past, new = parts
    old: Spec | None = past.meta.get("spec")
    return (
        dim in (2, -2)
        and past.op == "placeholder"
        and old is not None
        and len(old.shape) == 4
        and old.dtype == new.meta["spec"].dtype == spec.dtype
        and spec.dtype.is_floating_point
        and new.meta["spec"].shape[2] == 1
        and list(past.users) == [node]
        and kept.count(node) == 1
        and all(user.op == "output" or attends(user, node) for user in node.users)
    )


def attends(node: fx.Node, to: fx.Node | None = None) -> bool:
    """Attention of one query a row to keys and values other than the query."""
    if node.target is not aten.scaled_dot_product_attention.default:
        return False
    _, dropout, causal = _options(node)
    query: Any = node.args[0]
    return (
        not dropout
        and not causal
        and query.meta["spec"].shape[-2] == 1
        and len(query.meta["spec"].shape) == 4
        and query is not to
    )


def _options(node: fx.Node) -> tuple[Any, Any, Any]:
    names = ("attn_mask", "dropout_p", "is_causal")
    given = dict(zip(names, node.args[3:6], strict=False)) | dict(node.kwargs)
    return given.get("attn_mask"), given.get("dropout_p", 0.0), given.get("is_causal", False)


# -- the two forms of a growing program ------------------------------------------------------------


def append(buffer: Tensor, length: int, new: Tensor) -> Tensor:
    """Writes position ``length`` and returns all positions up to it."""
    buffer.select(2, length).copy_(new.select(2, 0))
    return buffer.narrow(2, 0, length + 1)


def grow_in_place(graph: fx.Graph, growths: Sequence[Growth]) -> None:
    """Every length: the program takes buffers for pasts, and one more placeholder, the length (an int).
    It no longer returns the grown caches."""
    _replace(graph, growths, fixed=False)


def grow_at_fixed_shapes(graph: fx.Graph, growths: Sequence[Growth], capacity: int) -> None:
    """One set of shapes for all lengths below ``capacity``: takes buffers for pasts, and one more
    placeholder, the position (int64, shape (1,), on the device). It no longer returns the grown caches."""
    _replace(graph, growths, fixed=True, capacity=capacity)


def _replace(graph: fx.Graph, growths: Sequence[Growth], *, fixed: bool, capacity: int = 0) -> None:
    placeholders = [n for n in graph.nodes if n.op == "placeholder"]
    output = graph.output_node()
    kept: list = list(output.args[0])  # type: ignore[arg-type]
    with graph.inserting_after(placeholders[-1]):
        position = graph.placeholder("position")
    grown = {kept[g.kept] for g in growths}
    if fixed:
        _attend_at_fixed_shapes(graph, grown, position, capacity)
    for g in growths:
        node = kept[g.kept]
        buffer, new = placeholders[g.past], node.args[0][1]
        with graph.inserting_before(node):
            if fixed:
                args: tuple = (buffer, 2, position, new)
                written = graph.call_function(aten.index_copy_.default, args)
            else:
                written = graph.call_function(append, (buffer, position, new))
        written.meta.update(node.meta)
        for user in [u for u in node.users if u is not output]:
            user.replace_input_with(node, written)
    places = {g.kept for g in growths}
    output.args = ([v for k, v in enumerate(kept) if k not in places],)
    for g in growths:
        graph.erase_node(kept[g.kept])
    graph.lint()


def _attend_at_fixed_shapes(graph: fx.Graph, grown: set, position: fx.Node, capacity: int) -> None:
    own: dict[torch.dtype, fx.Node] = {}  # masks of those that had none
    for node in [n for n in graph.nodes if attends(n)]:
        query, key, value = node.args[:3]
        if key not in grown and value not in grown:
            continue
        mask = _options(node)[0]
        if mask is None:
            dtype = query.meta["spec"].dtype
            if dtype not in own:
                with graph.inserting_after(position):
                    own[dtype] = graph.call_function(mask_until, (position, capacity, dtype))
            mask = own[dtype]
        scale = {k: v for k, v in node.kwargs.items() if k == "scale"}
        with graph.inserting_before(node):
            attention = graph.call_function(attend, (query, key, value, mask), scale)
        attention.meta.update(node.meta)
        node.replace_all_uses_with(attention)
        graph.erase_node(node)


def mask_until(position: Tensor, capacity: int, dtype: torch.dtype) -> Tensor:
    """Shape (1, 1, 1, capacity): 0 up to the position, -inf after it."""
    index = torch.arange(capacity, device=position.device)
    zero = torch.zeros((), dtype=dtype, device=position.device)
    return torch.where(index <= position, zero, float("-inf")).view(1, 1, 1, capacity)


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float | None = None) -> Tensor:
    """One query a row, (batch, heads, 1, width), to the unmasked positions of (batch, groups, capacity,
    width). The queries of one group are the rows of one attention, so that grouped heads need no copies."""
    batch, heads, _, width = query.shape
    groups, rows = key.shape[1], heads // key.shape[1]
    grouped = query.reshape(batch, groups, rows, width)
    if mask.shape[1] == heads:
        mask = mask.reshape(mask.shape[0], groups, rows, mask.shape[3])
    mask = mask.expand(batch, groups, rows, mask.shape[3])
    result = torch.nn.functional.scaled_dot_product_attention(grouped, key, value, mask, scale=scale)
    return result.reshape(batch, heads, 1, value.shape[-1])
