"""Which ops cost alike, and by which sizes: the terms in which devices are measured and predicted."""

from __future__ import annotations

import math
from dataclasses import dataclass

from genie.srg.cost import ATTENTIONS, CONVOLUTIONS
from genie.srg.graph import Cost, itemsize

_MATMULS = frozenset({"mm", "bmm", "matmul", "linear", "addmm", "baddbmm", "mv", "addmv"})
_NORMS = frozenset({"layer_norm", "native_layer_norm", "rms_norm", "group_norm", "native_group_norm"})
_BATCH_NORMS = frozenset({"batch_norm", "native_batch_norm", "_native_batch_norm_legit_no_training"})
_SOFTMAXES = frozenset({"softmax", "_softmax", "log_softmax", "_log_softmax"})
_GATHERS = frozenset({"embedding", "index_select", "gather", "index", "_unsafe_index"})
_REDUCTIONS = frozenset({
    "sum", "mean", "amax", "amin", "max", "min", "prod", "all", "any", "var", "std", "linalg_vector_norm",
    "norm", "argmax", "argmin", "cumsum", "logsumexp",
})  # fmt: skip
_COPIES = frozenset({"cat", "stack", "clone", "contiguous", "copy_", "_to_copy", "index_copy_", "repeat"})
_POOLS = frozenset({
    "max_pool2d", "max_pool2d_with_indices", "avg_pool2d", "adaptive_avg_pool2d", "_adaptive_avg_pool2d",
})  # fmt: skip

#: those that a report lists, in this order
FAMILIES = (
    "matmul", "conv", "attention", "norm", "softmax", "elementwise", "gather", "reduction", "copy", "pool",
)  # fmt: skip


def family(name: str) -> str:
    """One of `FAMILIES` for an op without namespace and overload; what is none else is elementwise."""
    if name in _MATMULS:
        return "matmul"
    if name in CONVOLUTIONS:
        return "conv"
    if name in ATTENTIONS:
        return "attention"
    if name in _NORMS or name in _BATCH_NORMS:
        return "norm"
    if name in _SOFTMAXES:
        return "softmax"
    if name in _GATHERS:
        return "gather"
    if name in _REDUCTIONS:
        return "reduction"
    if name in _COPIES:
        return "copy"
    return "pool" if name in _POOLS else "elementwise"


@dataclass(frozen=True)
class Work:
    """One op at one size. ``groups``: the names of sets of ops that are measured together, the closest
    first; a model takes the first that it has. ``features``: logarithms of the sizes."""

    groups: tuple[str, ...]
    flops: float
    nbytes: float
    features: tuple[float, ...]


def work(name: str, cost: Cost, share: float = 1.0) -> Work:
    """``share``: the part of the batch that is processed; weights are read whole."""
    kind, dims, size = family(name), cost.dims, itemsize(cost.dtype)
    if kind == "matmul" and len(dims) == 5:
        return _matmul(dims, size, share)
    if kind == "conv" and len(dims) == 7:
        return _conv(dims, size, share)
    if kind == "attention" and len(dims) == 6:
        batch, heads, queries, keys, width, mask = dims
        batch_heads = batch * heads * share
        # At the least 1 row, as each of the other sizes: the logarithms stay finite for an empty batch.
        features = _logs(batch_heads, queries, keys, width)
        elements = batch_heads * width * 2 * (queries + keys)
        flops = 4 * batch_heads * queries * keys * width
        return Work((kind + " masked", kind) if mask else (kind,), flops, elements * size, features)
    elements, row, ratio, scattered = dims if len(dims) == 4 else (cost.nbytes / (2 * size), 1, 1, 0)
    nbytes = cost.nbytes * share
    if kind == "elementwise" or kind == "copy":
        name = name.rstrip("_")
        closest = f"{kind} scattered" if scattered else f"{kind} {name}"
        return Work((closest, kind), 0.0, nbytes, _logs(elements * share))
    groups: tuple[str, ...] = (f"{kind} {name}", kind)
    if name in _BATCH_NORMS:
        groups = (f"{kind} batch",)
    if kind == "gather":
        return Work(groups, 0.0, nbytes, _logs(nbytes / size))
    if kind in ("reduction", "pool"):
        return Work(groups, 0.0, nbytes, _logs(elements * share, ratio))
    return Work(groups, 0.0, nbytes, _logs(elements * share, row))


def _matmul(dims: tuple[int, ...], size: int, share: float) -> Work:
    m, n, k, matrices, turned = dims
    if matrices > 1:
        count = matrices * share
        elements = count * (m * k + k * n + m * n)
        return Work(("bmm", "matmul"), 2 * count * m * n * k, elements * size, _logs(count * m, n, k))
    rows = m * share
    elements = rows * k + k * n + rows * n
    groups = ("linear", "matmul") if turned else ("matmul", "linear")
    return Work(groups, 2 * rows * n * k, elements * size, _logs(rows, n, k))


def _conv(dims: tuple[int, ...], size: int, share: float) -> Work:
    images, places, cin, cout, groups, kernel, ratio = dims
    images_here = images * share
    elements = images_here * places * groups * (cin * ratio + cout) + groups * cin * cout * kernel
    flops = 2 * images_here * places * groups * cin * cout * kernel
    rows = images_here * places
    if groups > 1:
        return Work(("conv grouped",), flops, elements * size, _logs(rows, groups, cin * cout, kernel))
    if kernel == 1:
        return Work(("conv 1x1", "conv"), flops, elements * size, _logs(rows, cin, cout, ratio))
    return Work(("conv", "conv 1x1"), flops, elements * size, _logs(rows, cin, cout, kernel))


def _logs(*sizes: float) -> tuple[float, ...]:
    return tuple([math.log(max(s, 1.0)) for s in sizes])
