"""GELU written out, in its tanh or its erf form, becomes the one op.

A chain is read as a polynomial in the input ``x`` and in ``t``, the tanh or erf: whichever way it is
spelled, ``0.5 x + 0.5 x t`` with ``t = tanh(sqrt(2 / pi) (x + 0.044715 x^3))`` or ``t = erf(x / sqrt(2))`` is
recognised. The op computes in float32 inside, so it rounds once where the chain rounds at each step.
"""

from __future__ import annotations

import math
from typing import Any

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

#: coefficients by the powers of (x, t)
Polynomial = dict[tuple[int, int], float]

_TANH = {(1, 0): math.sqrt(2 / math.pi), (3, 0): math.sqrt(2 / math.pi) * 0.044715}
_ERF = {(1, 0): math.sqrt(0.5)}
_GELU = {(1, 0): 0.5, (1, 1): 0.5}
_FORMS = {aten.tanh.default: (_TANH, "tanh"), aten.erf.default: (_ERF, "none")}
_SUMS = frozenset({aten.add.Tensor, aten.add.Scalar})
_PRODUCTS = frozenset({aten.mul.Tensor, aten.mul.Scalar})
_QUOTIENTS = frozenset({aten.div.Tensor, aten.div.Scalar})
_POWERS = frozenset({aten.pow.Tensor_Scalar, aten.square.default})
_MAX_DEGREE = 4
_MAX_HEIGHT = 4  # calls above the tanh; the usual chain has two


def gelu(graph: fx.Graph) -> int:
    unstable = written_storages(graph)
    outputs = set(kept(graph))
    changed = 0
    for node in list(graph.nodes):
        if node._erased or overload(node) not in _FORMS:
            continue
        inner, approximate = _FORMS[node.target]
        found = _chain(node, inner)
        if found is None:
            continue
        x, root, inside = found
        made = spec(x)
        if made is None or not made.dtype.is_floating_point or storages([x, root, *inside]) & unstable:
            continue
        if any((s := spec(n)) is None or (s.shape, s.dtype) != (made.shape, made.dtype) for n in inside):
            continue
        if any(n in outputs or set(n.users) - inside - {root} for n in inside - {root}):
            continue  # part of it is computed anyway
        if replaced(root, aten.gelu.default, (x,), {"approximate": approximate}):
            erase_unread(inside - {root})
            changed += 1
    return changed


def _chain(t: fx.Node, inner: Polynomial) -> tuple[fx.Node, fx.Node, set[fx.Node]] | None:
    """The input, the last call, and all calls between them."""
    for x in _below(t.args[0], _MAX_DEGREE + 2):
        inside: set[fx.Node] = set()
        if not _equal(_read(t.args[0], x, None, inside), inner):
            continue
        inside.add(t)
        root = t
        for _ in range(_MAX_HEIGHT):
            if len(root.users) != 1:
                break
            root = next(iter(root.users))
            outer: set[fx.Node] = set()
            if _equal(_read(root, x, t, outer), _GELU):
                return x, root, inside | outer
    return None


def _below(value: Any, depth: int) -> list[fx.Node]:
    """What the value is computed from by sums, products and powers, nearest first; each once."""
    level, found = [value], dict[fx.Node, None]()
    for _ in range(depth):
        nodes = [n for n in level if isinstance(n, fx.Node) and n not in found]
        found.update(dict.fromkeys(nodes))
        arithmetic = [n for n in nodes if overload(n) in _SUMS | _PRODUCTS | _QUOTIENTS | _POWERS]
        level = [a for n in arithmetic for a in n.args]
    return list(found)


def _read(value: Any, x: fx.Node, t: fx.Node | None, inside: set[fx.Node]) -> Polynomial | None:
    """The value as a polynomial; the calls that it takes go into ``inside``."""
    if value is x:
        return {(1, 0): 1.0}
    if value is t:
        return {(0, 1): 1.0}
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return {(0, 0): float(value)}
    if not isinstance(value, fx.Node) or len(inside) > 24:
        return None
    op = overload(value)
    result: Polynomial | None = None
    if op in _POWERS:
        base = _read(value.args[0], x, t, inside)
        exponent = 2 if op is aten.square.default else argument(value, "exponent")
        if base is not None and exponent in (2, 3):
            result = base
            for _ in range(int(exponent) - 1):
                result = _times(result, base)
    elif op in _SUMS | _PRODUCTS | _QUOTIENTS and len(value.args) == 2 and not value.kwargs:
        a, b = (_read(v, x, t, inside) for v in value.args)
        if a is None or b is None:
            return None
        if op in _SUMS:
            result = dict(a)
            for powers, c in b.items():
                result[powers] = result.get(powers, 0.0) + c
        elif op in _PRODUCTS:
            result = _times(a, b)
        elif list(b) == [(0, 0)] and b[0, 0]:
            result = {powers: c / b[0, 0] for powers, c in a.items()}
    if result is None or max((i + j for i, j in result), default=0) > _MAX_DEGREE:
        return None
    inside.add(value)
    return result


def _times(a: Polynomial, b: Polynomial) -> Polynomial:
    result: Polynomial = {}
    for (i, j), c in a.items():
        for (k, m), d in b.items():
            result[i + k, j + m] = result.get((i + k, j + m), 0.0) + c * d
    return result


def _equal(a: Polynomial | None, b: Polynomial) -> bool:
    return a is not None and a.keys() == b.keys() and all(math.isclose(a[k], b[k], rel_tol=1e-6) for k in b)
