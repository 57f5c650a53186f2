"""Layer norm and RMS norm written out become the one op.

    RMS norm:    h * rsqrt(mean(h^2) + eps) [cast to the input's dtype] [* weight]
    layer norm:  d * rsqrt(mean(d^2) + eps) [* weight [+ bias]], d = h - mean(h)

over the last dimension, h in float32 (or float64) as Llama and T5 compute it. The op computes in float32
whatever its input is, so for half inputs the casts go too; the result then differs by one rounding, since the
chain rounds before it multiplies by the weight and the op after it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import fx

from genie.server.engines.rewrite.facts import (
    argument,
    aten,
    erase_unread,
    kept,
    overload,
    replaced,
    spec,
    storages,
    written_storages,
)

_EXACT = (torch.float32, torch.float64)
_ADD = frozenset({aten.add.Tensor, aten.add.Scalar})


class _Normed(NamedTuple):
    """``root`` is ``source`` over the root of its mean square. ``inside``: the calls up to ``root``."""

    source: fx.Node
    squared: fx.Node  # what is squared: the source, or the source in float32
    root: fx.Node
    eps: float
    inside: set[fx.Node]


def norms(graph: fx.Graph) -> int:
    unstable, outputs = written_storages(graph), set(kept(graph))
    changed = 0
    for node in list(graph.nodes):
        if node._erased:
            continue
        found = _normed(node) or _by_variance(node)
        if found is None:
            continue
        for op, args, root, inside in (*_layer_norms(found), *_rms_norms(found)):
            inner = inside - {root}
            if storages([found.source, *inside]) & unstable:
                break
            if any(n in outputs or set(n.users) - inside for n in inner):
                continue  # part of it is computed anyway
            if replaced(root, op, args):
                erase_unread(inner)
                changed += 1
                break
    return changed


def _rms_norms(found: _Normed) -> Iterator[tuple[Any, tuple, fx.Node, set[fx.Node]]]:
    """What may be put in the chain's place, the most first."""
    root, inside, source, size = found.root, set(found.inside), found.source, _size(found.root)
    if _is_centred(source):
        return  # a layer norm of which too much is read: centring it here would be computing it twice
    x: Any = source
    if overload(x) is aten._to_copy.default and _dtype(x.args[0]) != _dtype(x):
        x = x.args[0]
    cast = _only(root, aten._to_copy.default)
    down = cast is not None and _dtype(cast) == _dtype(x) and _dtype(cast) != _dtype(root)
    if down:
        assert cast is not None
        inside |= {cast, *({source} if x is not source else ())}
        top = cast
    else:
        x, top = found.squared, root
        if _dtype(x) != _dtype(root):
            return
    scaled = _scaled(top, aten.mul.Tensor, size)
    if scaled is not None:
        yield aten.rms_norm.default, (x, [size], scaled[1], found.eps), scaled[0], {*inside, scaled[0]}
    if top is not root or scaled is None:
        yield aten.rms_norm.default, (x, [size], None, found.eps), top, inside
    if scaled is not None and top is root:
        yield aten.rms_norm.default, (x, [size], None, found.eps), root, set(found.inside)


def _layer_norms(found: _Normed) -> Iterator[tuple[Any, tuple, fx.Node, set[fx.Node]]]:
    centred, size = found.source, _size(found.root)
    if centred is not found.squared or not _is_centred(centred):
        return
    h: Any = centred.args[0]
    mean: Any = centred.args[1]
    inside = {*found.inside, centred, mean}
    scaled = _scaled(found.root, aten.mul.Tensor, size)
    shifted = _scaled(scaled[0], aten.add.Tensor, size) if scaled is not None else None
    if scaled is not None and shifted is not None:
        every = {*inside, scaled[0], shifted[0]}
        yield aten.layer_norm.default, (h, [size], scaled[1], shifted[1], found.eps), shifted[0], every
    if scaled is not None:
        every = {*inside, scaled[0]}
        yield aten.layer_norm.default, (h, [size], scaled[1], None, found.eps), scaled[0], every
    yield aten.layer_norm.default, (h, [size], None, None, found.eps), found.root, inside


def _normed(node: fx.Node) -> _Normed | None:
    """If the call divides a value by the root of its mean square."""
    for source, inverse in _divided(node):
        sides = _plus_eps(inverse[-1])
        if sides is None:
            continue
        mean, eps, inner = sides
        squared = _square_of(mean.args[0]) if _is_mean(mean) else None
        if squared is None or _dtype(squared) not in _EXACT or _dtype(node) != _dtype(squared):
            continue
        inside = {node, *inverse, *inner, mean, mean.args[0]}
        if squared is source:
            return _Normed(source, squared, node, eps, inside)  # type: ignore[arg-type]
        if overload(squared) is aten._to_copy.default and squared.args[0] is source:
            # T5 multiplies the half input itself; the product is float32 all the same.
            return _Normed(source, squared, node, eps, {*inside, squared})  # type: ignore[arg-type]
    return None


def _by_variance(node: fx.Node) -> _Normed | None:
    """The same for ``h - mean(h)`` over the root of the variance of ``h``."""
    for centred, inverse in _divided(node):
        sides = _plus_eps(inverse[-1])
        if sides is None or not _is_centred(centred):
            continue
        variance, eps, inner = sides
        if not _is_variance(variance) or variance.args[0] is not centred.args[0]:
            continue
        if _dtype(node) in _EXACT and _dtype(centred) == _dtype(node):
            return _Normed(centred, centred, node, eps, {node, *inverse, *inner, variance})
    return None


def _divided(node: fx.Node) -> Iterator[tuple[fx.Node, list[fx.Node]]]:
    """Ways to read the call as a value by the root of another; the calls that make the root, and its root's
    argument last."""
    if len(node.args) != 2 or node.kwargs:
        return
    a, b = node.args
    if not isinstance(a, fx.Node) or not isinstance(b, fx.Node):
        return
    if overload(node) is aten.mul.Tensor:
        for source, inverse in ((a, b), (b, a)):
            op = overload(inverse)
            if op is aten.rsqrt.default or (op is aten.pow.Tensor_Scalar and inverse.args[1] == -0.5):
                yield source, [inverse]
            elif op is aten.reciprocal.default and overload(inverse.args[0]) is aten.sqrt.default:
                yield source, [inverse, inverse.args[0]]  # type: ignore[list-item]
    elif overload(node) is aten.div.Tensor and overload(b) is aten.sqrt.default:
        yield a, [b]


def _plus_eps(root: fx.Node) -> tuple[fx.Node, float, set[fx.Node]] | None:
    total = root.args[0]
    if not isinstance(total, fx.Node) or overload(total) not in _ADD or total.kwargs or len(total.args) != 2:
        return None
    for value, eps in (total.args, total.args[::-1]):
        if isinstance(value, fx.Node) and isinstance(eps, (int, float)):
            return value, float(eps), {total}
    return None


def _is_mean(node: Any) -> bool:
    """Over the last dimension, which stays with one element."""
    if not isinstance(node, fx.Node) or overload(node) is not aten.mean.dim:
        return False
    if argument(node, "dtype") not in (None, _dtype(node.args[0])):
        return False
    return _is_last(argument(node, "dim"), node.args[0]) and argument(node, "keepdim") is True


def _is_centred(node: fx.Node) -> bool:
    """``h - mean(h)``"""
    if overload(node) is not aten.sub.Tensor or len(node.args) != 2 or node.kwargs:
        return False
    h, mean = node.args
    return _is_mean(mean) and mean.args[0] is h  # type: ignore[union-attr]


def _is_variance(node: fx.Node) -> bool:
    op = overload(node)
    if op is aten.var.correction:
        biased = argument(node, "correction") == 0
    elif op is aten.var.dim:
        biased = argument(node, "unbiased") is False
    else:
        return False
    return biased and _is_last(argument(node, "dim"), node.args[0]) and argument(node, "keepdim") is True


def _is_last(dims: Any, value: Any) -> bool:
    s = spec(value)
    return s is not None and bool(s.shape) and list(dims or ()) in ([-1], [len(s.shape) - 1])


def _square_of(node: Any) -> fx.Node | None:
    op = overload(node) if isinstance(node, fx.Node) else None
    if op is aten.square.default or (op is aten.pow.Tensor_Scalar and node.args[1] == 2):
        return node.args[0]
    if op is aten.mul.Tensor and node.args[0] is node.args[1]:
        return node.args[0]
    return None


def _scaled(node: fx.Node, op: Any, size: int) -> tuple[fx.Node, fx.Node] | None:
    """The only reader of the value, if it is ``op`` with a vector of that size and dtype; and the vector."""
    reader = _only(node, op)
    if reader is None or reader.kwargs or len(reader.args) != 2:
        return None
    vector = reader.args[1] if reader.args[0] is node else reader.args[0]
    s = spec(vector) if isinstance(vector, fx.Node) else None
    if s is None or s.shape != (size,) or s.dtype != _dtype(node) or _dtype(reader) != s.dtype:
        return None
    return reader, vector  # type: ignore[return-value]


def _only(node: fx.Node, op: Any) -> fx.Node | None:
    if len(node.users) != 1:
        return None
    reader = next(iter(node.users))
    return reader if overload(reader) is op else None


def _dtype(node: Any) -> torch.dtype | None:
    s = spec(node) if isinstance(node, fx.Node) else None
    return None if s is None else s.dtype


def _size(node: fx.Node) -> int:
    s = spec(node)
    assert s is not None
    return s.shape[-1] if s.shape else 0
