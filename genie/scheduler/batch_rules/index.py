"""Ops that read or write at places that another tensor names."""

from __future__ import annotations

from collections.abc import Callable

from genie.scheduler.batch_rules.proof import Proof, Tags
from genie.scheduler.batch_rules.shape import dim_of
from genie.srg.graph import Node

_TABLE = "looks up in the batch"


def embedding(p: Proof, node: Node) -> None:
    table, places = node.inputs[:2]
    last = len(p.shape[node.outputs[0]]) - 1
    operands = [(table, [-1, last]), (places, range(last))]
    p.tag(node.outputs[0], p.join(node, operands, _TABLE), node)


def searched(places: int, table: int) -> Callable[[Proof, Node], None]:
    """isin, bucketize, searchsorted of a vector: each element alone, in a table that is needed whole."""

    def rule(p: Proof, node: Node) -> None:
        if len(node.inputs) != 2 or (node.name == "searchsorted" and len(p.shape[node.inputs[table]]) != 1):
            p.all_whole(node, node.inputs, "searches in the batch")
            return
        x, values = node.inputs[places], node.inputs[table]
        rank = len(p.shape[x])
        operands = [(x, range(rank)), (values, [-1] * len(p.shape[values]))]
        p.tag(node.outputs[0], p.join(node, operands, "searches in the batch"), node)

    return rule


def gather(p: Proof, node: Node) -> None:
    """out[i, j] = x[index[i, j], j] for dimension 0: x is whole along it, the index need not be."""
    x, index = node.inputs
    dim = dim_of(p, node, 1)
    rank = len(p.shape[x])
    operands = [(x, [-1 if d == dim else d for d in range(rank)]), (index, range(rank))]
    p.tag(node.outputs[0], p.join(node, operands, _TABLE, broadcast=False), node)


def scatter(p: Proof, node: Node) -> None:
    """All have the batch along one and the same dimension, other than that of the places."""
    target = node.inputs[0]
    dim = dim_of(p, node, 1)
    labels = [-1 if d == dim else d for d in range(len(p.shape[target]))]
    operands = [(v, labels[: len(p.shape[v])]) for v in node.inputs]
    tags = p.join(node, operands, "scatters along the batch", broadcast=False)
    for output in node.outputs:
        p.tag(output, tags, node)


def index_select(p: Proof, node: Node) -> None:
    x, index = node.inputs
    dim = dim_of(p, node, 1)
    labels = [-1 if d == dim else d for d in range(len(p.shape[x]))]
    operands = [(x, labels), (index, [dim] if p.shape[index] else [])]
    p.tag(node.outputs[0], p.join(node, operands, "picks among the rows of the batch"), node)


def index_write(p: Proof, node: Node) -> None:
    """index_copy, index_add, index_fill along a dimension that is not the batch's."""
    x, index = node.inputs[:2]
    dim = dim_of(p, node, 1)
    labels = [-1 if d == dim else d for d in range(len(p.shape[x]))]
    operands = [(x, labels), (index, [-1] * len(p.shape[index]))]
    operands += [(v, labels[: len(p.shape[v])]) for v in node.inputs[2:]]
    tags = p.join(node, operands, "writes along the batch", broadcast=False)
    for output in node.outputs:
        p.tag(output, tags, node)


def _places(p: Proof, node: Node) -> tuple[list[int | None], int]:
    """Of ``x[...]``: the index tensor of each dimension of x, None where all of it is taken; and how many
    tensors these are."""
    slot = p.slot(node, 1, "indices")
    if slot is None:
        return [], 0
    present = [1] * slot.width if slot.kind == "tl" else list(slot.payload)
    values = iter(node.inputs[slot.tensor : slot.tensor + slot.width])
    return [next(values) if one else None for one in present], slot.width


def _indexed(p: Proof, node: Node) -> tuple[Tags, int] | None:
    """Tags of ``x[indices]``, and its number of dimensions. None: all inputs were needed whole.

    The dimensions of the indices, broadcast together, stand where the first of them stood if they were
    side by side, else in front. A counter of rows as the index of the batch gives each row itself.
    """
    x = node.inputs[0]
    places, count = _places(p, node)
    if x in p.counters:
        p.all_whole(node, (x,), "computes with the numbers of rows")
    places += [None] * (len(p.shape[x]) - len(places))
    at = [d for d, v in enumerate(places) if v is not None]
    if not at or any(p.is_mask(v) for v in places if v is not None):
        p.all_whole(node, node.inputs, "selects by a mask")
        return None
    width = max(len(p.shape[v]) for v in places if v is not None)
    first = at[0] if at[-1] - at[0] + 1 == len(at) else 0
    own = {dim: variable for variable, dim in p.tags(x)}
    operands: list[tuple[int, list[int]]] = []
    labels, seen = [], 0
    for d, v in enumerate(places):
        if v is None:
            labels.append(d if d < first else first + width + seen)
            seen += d >= first
            continue
        labels.append(-1)
        aligned = list(range(first + width - len(p.shape[v]), first + width))
        if v in p.counters:
            tags = p.tags(v)
            if d in own and len(tags) == 1 and p.shape[x][d] == p.size:
                p.unite(own[d], tags[0][0], node)
                labels[-1] = aligned[tags[0][1]]
            else:
                p.all_whole(node, (v,), "reads by the number of the row")
        operands.append((v, aligned))
    tags = p.join(node, [(x, labels), *operands], "picks among the rows of the batch")
    return tags, len(p.shape[x]) - count + width


def index(p: Proof, node: Node) -> None:
    found = _indexed(p, node)
    if found is not None:
        p.tag(node.outputs[0], found[0], node)


def index_put(p: Proof, node: Node) -> None:
    """``x[indices] = values``: the values lie along the batch as what is read there would."""
    x, values = node.inputs[0], node.inputs[-1]
    places, count = _places(p, node)
    if values in p.counters or x in p.counters:
        p.all_whole(node, (x, values), "computes with the numbers of rows")
    if count == 1 and places[0] is not None and p.is_mask(places[0]) and not p.shape[values]:
        # x[mask] = number: each element alone, under a mask of the leading dimensions
        rank = len(p.shape[x])
        tags = p.join(node, [(x, range(rank)), (places[0], range(len(p.shape[places[0]])))], "", False)
        for output in node.outputs:
            p.tag(output, tags, node)
        return
    found = _indexed(p, node)
    if found is None:
        return
    tags, rank = found
    own = p.tags(x)
    source = p.tags(values)
    if not tags and not source:
        return
    if not own or not tags:
        p.all_whole(node, node.inputs, "writes the batch into a value without it")
        return
    shape = p.shape[values]
    (variable, label) = tags[0]
    dim = label - (rank - len(shape))
    if len(tags) > 1 or any(d != dim for _, d in source):
        p.all_whole(node, node.inputs, "writes the batch elsewhere than along its rows")
    elif source:
        p.unite(variable, source[0][0], node)
    elif dim >= 0 and shape[dim] != 1:
        p.whole(variable, node, "writes a whole value into the batch")
    for output in node.outputs:
        p.tag(output, own, node)


def one_hot(p: Proof, node: Node) -> None:
    if p.ints(node, 1) in (None, (-1,)):
        p.all_whole(node, node.inputs, "finds its number of classes in the batch")
    else:
        p.tag(node.outputs[0], p.tags(node.inputs[0]), node)


RULES = {
    "embedding": embedding,
    "isin": searched(0, 1),
    "bucketize": searched(0, 1),
    "searchsorted": searched(1, 0),
    "gather": gather,
    **dict.fromkeys(("scatter", "scatter_add", "scatter_reduce"), scatter),
    "index_select": index_select,
    **dict.fromkeys(("index_copy", "index_add", "index_fill"), index_write),
    **dict.fromkeys(("index", "_unsafe_index"), index),
    **dict.fromkeys(("index_put", "_unsafe_index_put", "_index_put_impl"), index_put),
    "one_hot": one_hot,
}
