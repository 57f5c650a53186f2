"""Ops that move, cut or repeat dimensions of one tensor, and those that put tensors together."""

from __future__ import annotations

from collections.abc import Callable
from math import prod

from genie.scheduler.batch_rules.proof import TRUE, Proof
from genie.srg.graph import Node


def follow(p: Proof, node: Node, move: Callable[[int], int], why: str) -> None:
    """Tags all outputs: ``move`` gives the new dimension of an old one, -1 where it is needed whole."""
    value = node.inputs[0]
    tags = []
    for variable, dim in p.tags(value):
        to = move(dim)
        if to < 0:
            p.whole(variable, node, why)
        else:
            tags.append((variable, to))
    if tags:
        kept = p.along(tags)
        for output in node.outputs:
            p.state[output] = kept


def dim_of(p: Proof, node: Node, position: int, name: str = "dim", default: int = 0, rank: int = 0) -> int:
    """A dimension that is an argument, from 0; of a tensor of ``rank`` dimensions (0: the first input)."""
    found = p.ints(node, position, name)
    return (found[0] if found else default) % max(rank or len(p.shape[node.inputs[0]]), 1)


def view(p: Proof, node: Node) -> None:
    """Rows that are outermost in one dimension, with as much before them as before, are the same rows."""
    value, output = node.inputs[0], node.outputs[0]
    old, new = p.shape[value], node.specs[0].shape  # type: ignore[union-attr]
    literals = node.literals
    if node.args[1][0] == "dt":  # to a dtype of another width the last dimension changes
        if value in p.counters:
            p.all_whole(node, (value,), "computes with the numbers of rows")
        changed = -1 if old == new else len(old) - 1
        follow(p, node, lambda d: -1 if d == changed else d, "reads the bytes of the batch otherwise")
        return
    tags = []
    for variable, dim in p.tags(value):
        before, at, to = prod(old[:dim]), 1, -1
        for e, n in enumerate(new):
            if at == before and n % p.size == 0 and n:
                to = e
                break
            at *= n
        if to < 0:
            p.whole(variable, node, f"mixes the rows of the batch ({list(old)} to {list(new)})")
            continue
        if literals[to] != -1:
            p.scaled.append((variable, node.number, to, new[to] // p.size))
        tags.append((variable, to))
    if tags:
        p.state[output] = p.along(tags)


def permute(p: Proof, node: Node) -> None:
    rank = len(p.shape[node.inputs[0]])
    order = [d % rank for d in p.ints(node, 1, "dims") or ()]
    follow(p, node, order.index, "")


def transpose(p: Proof, node: Node) -> None:
    a, b = dim_of(p, node, 1, "dim0"), dim_of(p, node, 2, "dim1")
    follow(p, node, lambda d: b if d == a else a if d == b else d, "")


def t(p: Proof, node: Node) -> None:
    rank = len(p.shape[node.inputs[0]])
    follow(p, node, lambda d: rank - 1 - d, "")


def m_t(p: Proof, node: Node) -> None:
    last = len(p.shape[node.inputs[0]]) - 1
    follow(p, node, lambda d: 2 * last - 1 - d if d >= last - 1 else d, "")


def unsqueeze(p: Proof, node: Node) -> None:
    new = dim_of(p, node, 1, rank=len(p.shape[node.inputs[0]]) + 1)
    follow(p, node, lambda d: d + (d >= new), "")


def squeeze(p: Proof, node: Node) -> None:
    """A part may have one row: without dimensions, or with the batch's, it would go."""
    shape, dims = p.shape[node.inputs[0]], p.ints(node, 1, "dim")
    if dims is None:
        follow(p, node, lambda d: -1, "would remove a batch of one row: give it a dimension")
        return
    gone = {d % len(shape) for d in dims} if shape else set()
    follow(
        p, node,
        lambda d: -1 if d in gone else d - sum(shape[g] == 1 for g in gone if g < d),
        "would remove a batch of one row",
    )  # fmt: skip


def select(p: Proof, node: Node) -> None:
    gone = dim_of(p, node, 1)
    follow(p, node, lambda d: -1 if d == gone else d - (d > gone), "takes one row of the batch")


def slice_(p: Proof, node: Node) -> None:
    """Of the batch: only all of it. An end beyond a size is that size, so it may stay."""
    dim = dim_of(p, node, 1)
    tags = p.tags(node.inputs[0])
    if all(d != dim for _, d in tags):
        p.state[node.outputs[0]] = tags
        return
    n = p.shape[node.inputs[0]][dim]
    start, end, step = p.ints(node, 2, "start"), p.slot(node, 3, "end"), p.ints(node, 4, "step")
    last = n if end is None else node.literals[end.literal]
    full = start in (None, (0,)) and step in (None, (1,)) and last >= n
    follow(p, node, lambda d: d if d != dim or full else -1, "cuts the batch")
    if full and end is not None and last == n:
        for variable, d in tags:
            if d == dim:
                p.scaled.append((variable, node.number, end.literal, n // p.size))


def cut(position: int, default: int = 0, why: str = "cuts the batch"):  # type: ignore[no-untyped-def]
    """The dimension at ``position`` is needed whole, all others stay what they are."""

    def rule(p: Proof, node: Node) -> None:
        dim = dim_of(p, node, position, default=default)
        follow(p, node, lambda d: -1 if d == dim else d, why)

    return rule


def unbind(p: Proof, node: Node) -> None:
    gone = dim_of(p, node, 1)
    follow(p, node, lambda d: -1 if d == gone else d - (d > gone), "takes the rows of the batch apart")


def diagonal(p: Proof, node: Node) -> None:
    a, b = dim_of(p, node, 2, "dim1", 0), dim_of(p, node, 3, "dim2", 1)
    follow(p, node, lambda d: -1 if d in (a, b) else d - (d > a) - (d > b), "takes a diagonal of the batch")


def unfold(p: Proof, node: Node) -> None:
    dim = dim_of(p, node, 1, "dimension")
    follow(p, node, lambda d: -1 if d == dim else d, "cuts the batch")


def expand(p: Proof, node: Node) -> None:
    """A dimension of size 1 may be blown up to the batch's size."""
    value, output = node.inputs[0], node.outputs[0]
    old, new, literals = p.shape[value], node.specs[0].shape, node.literals  # type: ignore[union-attr]
    more = len(new) - len(old)
    tags = []
    for variable, dim in p.tags(value):
        to = dim + more
        if literals[to] != -1:
            p.scaled.append((variable, node.number, to, new[to] // p.size))
        tags.append((variable, to))
    if value not in p.counters and not (tags and tags[0][0] == TRUE):
        for to, n in enumerate(new):
            if n % p.size == 0 and n and (to < more or old[to - more] == 1):
                tags.append((p.candidate(node, to, n // p.size), to))
    if tags:
        p.state[output] = p.along(tags)


def repeat(p: Proof, node: Node) -> None:
    """Copies are outermost: of one row, they are rows of a batch."""
    value, times = node.inputs[0], p.ints(node, 1, "repeats") or ()
    old = p.shape[value]
    more = len(times) - len(old)
    tags = []
    for variable, dim in p.tags(value):
        if times[dim + more] != 1:
            p.whole(variable, node, "repeats the batch")
        else:
            tags.append((variable, dim + more))
    if not (tags and tags[0][0] == TRUE):
        taken = {to for _, to in tags}
        for to, n in enumerate(times):
            if to not in taken and n > 0 and n % p.size == 0 and 0 not in old:
                tags.append((p.candidate(node, to, n // p.size), to))
    if tags:
        p.state[node.outputs[0]] = p.along(tags)


def repeat_interleave(p: Proof, node: Node) -> None:
    """Each element several times in a row: rows stay outermost in their dimension."""
    slot, dim = p.slot(node, 1, "repeats"), p.ints(node, 2, "dim")
    if slot is None or slot.kind != "i" or dim is None or p.slot(node, 3, "output_size") is not None:
        p.all_whole(node, node.inputs, "repeats the batch in a way that has no rule")
        return
    follow(p, node, lambda d: d, "")
    at, n = dim[0] % len(p.shape[node.inputs[0]]), node.literals[slot.literal]
    if p.shape[node.inputs[0]][at] == 1 and n > 0 and n % p.size == 0:
        tags = p.tags(node.inputs[0])
        if not (tags and tags[0][0] == TRUE):
            made = p.candidate(node, slot.literal, n // p.size)
            p.state[node.outputs[0]] = (*tags, (made, at))


def flip(p: Proof, node: Node) -> None:
    rank = len(p.shape[node.inputs[0]])
    dims = {d % rank for d in p.ints(node, 1, "dims") or ()}
    follow(p, node, lambda d: -1 if d in dims else d, "reverses the batch")


def roll(p: Proof, node: Node) -> None:
    rank = len(p.shape[node.inputs[0]])
    dims = {d % rank for d in p.ints(node, 2, "dims") or range(rank)}
    follow(p, node, lambda d: -1 if d in dims else d, "rolls the batch")


def pad(p: Proof, node: Node) -> None:
    widths = p.ints(node, 1, "pad") or ()
    rank = len(p.shape[node.inputs[0]])
    padded = {rank - 1 - k // 2 for k, width in enumerate(widths) if width}
    follow(p, node, lambda d: -1 if d in padded else d, "pads the batch")


def reflect(p: Proof, node: Node) -> None:
    """Reflection and replication pad the last dimensions, by nothing or not."""
    first = len(p.shape[node.inputs[0]]) - len(p.ints(node, 1, "padding") or ()) // 2
    follow(p, node, lambda d: -1 if d >= first else d, "pads the batch")


def triangle(p: Proof, node: Node) -> None:
    last = len(p.shape[node.inputs[0]]) - 2
    follow(p, node, lambda d: -1 if d >= last else d, "treats each row of the batch otherwise")


def cat(p: Proof, node: Node) -> None:
    """All tensors must have the batch; an empty vector counts as nothing (PyTorch's own exception)."""
    operands = [v for v in p.values(node, 0, "tensors") if p.shape[v] != [0]]
    if not operands:
        return
    rank = len(p.shape[operands[0]])
    dim = dim_of(p, node, 1, rank=rank)
    labels = [-1 if d == dim else d for d in range(rank)]
    why = "concatenates along the batch"
    p.tag(node.outputs[0], p.join(node, [(v, labels) for v in operands], why, broadcast=False), node)


def stack(p: Proof, node: Node) -> None:
    operands = p.values(node, 0, "tensors")
    rank = len(p.shape[operands[0]]) + 1
    dim = dim_of(p, node, 1, rank=rank)
    labels = [d for d in range(rank) if d != dim]
    p.tag(node.outputs[0], p.join(node, [(v, labels) for v in operands], "", broadcast=False), node)
