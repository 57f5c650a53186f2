"""Computes the positions that are read: a slice of some positions moves in front of what is computed for all.

Where all that is read of a value [batch, positions, ...] is a slice or one position, everything that works on
each position by itself, down to the last attention, is computed for those only: the logits, the final norm,
the last layer's MLP. Values that are kept, or read in full by anyone else, stay whole.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import fx

from genie.server.engines.rewrite.copies import renumber
from genie.server.engines.rewrite.facts import (
    argument,
    aten,
    infer,
    insert,
    kept,
    makes_memory,
    overload,
    same_geometry,
    spec,
    storages,
    written_storages,
)

_UNARY = frozenset(
    {
        aten.gelu.default, aten.relu.default, aten.silu.default, aten.sigmoid.default, aten.tanh.default,
        aten.neg.default, aten.rsqrt.default, aten._to_copy.default, aten.pow.Tensor_Scalar, aten.erf.default,
    }
)  # fmt: skip
_BINARY = frozenset(
    {
        aten.add.Tensor, aten.mul.Tensor, aten.sub.Tensor, aten.div.Tensor,
        aten.add.Scalar, aten.mul.Scalar, aten.sub.Scalar, aten.div.Scalar,
    }
)  # fmt: skip
_NORMS = frozenset({aten.layer_norm.default, aten.rms_norm.default})


class _Window(NamedTuple):
    """Positions ``start`` to ``start + length`` of dimension 1, of ``size``. ``batch`` is dimension 0."""

    batch: int
    size: int
    start: int
    length: int


class _Step(NamedTuple):
    """How a call is done for a window: its inputs that have positions, and whether these are in rows
    [batch * positions, ...] in its result."""

    inputs: tuple[fx.Node, ...]
    in_rows: bool


def last_position(graph: fx.Graph) -> int:
    changed = 0
    for node in list(graph.nodes):
        if not node._erased and overload(node) in (aten.slice.Tensor, aten.select.int):
            changed += _narrowed(graph, node)
    return changed


def _narrowed(graph: fx.Graph, node: fx.Node) -> bool:
    full = node.args[0]
    window = _window(node)
    if window is None or not isinstance(full, fx.Node):
        return False
    steps = _steps(graph, node, full, window)
    if not any(makes_memory(n) for n in steps):
        return False
    made: list[fx.Node] = []
    values: dict[fx.Node, fx.Node] = {}
    for old in sorted(steps):
        for source in steps[old].inputs:
            if source not in steps and source not in values:
                end = window.start + window.length
                values[source] = insert(node, aten.slice.Tensor, (source, 1, window.start, end), view=True)
                made.append(values[source])
        args = tuple(values.get(a, a) if isinstance(a, fx.Node) else a for a in old.args)
        if overload(old) in (aten.view.default, aten.reshape.default):
            args = (args[0], _view_of_window(old, steps[old].in_rows, window))
        values[old] = insert(node, old.target, args, old.kwargs, view=not makes_memory(old))  # type: ignore[arg-type]
        made.append(values[old])
    result = values[full]
    if overload(node) is aten.select.int:
        result = insert(node, aten.select.int, (result, 1, 0), view=True)
        made.append(result)
    if not _fits(node, result):
        for n in reversed(made):
            graph.erase_node(n)
        return False
    before, after = spec(node), spec(result)
    assert before is not None and after is not None
    if before.storage != after.storage:
        renumber(graph, before.storage, after.storage)
    node.replace_all_uses_with(result)
    for n in (node, *sorted(steps, reverse=True)):
        graph.erase_node(n)
    return True


def _window(node: fx.Node) -> _Window | None:
    s = spec(node.args[0]) if isinstance(node.args[0], fx.Node) else None
    if s is None or len(s.shape) < 3 or argument(node, "dim") not in (1, 1 - len(s.shape)):
        return None
    size = s.shape[1]
    if overload(node) is aten.select.int:
        start = argument(node, "index")
        end = start + 1 if start != -1 else size
    else:
        start, end = argument(node, "start") or 0, argument(node, "end")
        end = size if end is None else end
        if argument(node, "step") != 1:
            return None
    start, end = (min(max(v + size if v < 0 else v, 0), size) for v in (start, end))
    return _Window(s.shape[0], size, start, end - start) if 0 < end - start < size else None


def _steps(graph: fx.Graph, last: fx.Node, full: fx.Node, window: _Window) -> dict[fx.Node, _Step]:
    """What can be computed for the window only: all that is read by nothing but itself and the slice."""
    outputs, unstable = set(kept(graph)), written_storages(graph)
    steps: dict[fx.Node, _Step] = {}
    waiting = [(full, False)]
    while waiting:
        node, in_rows = waiting.pop()
        if node in steps:
            if steps[node].in_rows != in_rows:
                return {}
            continue
        step = _step(node, in_rows, window)
        if step is None or node in outputs or storages([node, *node.all_input_nodes]) & unstable:
            continue
        steps[node] = step
        rows = (
            in_rows
            if overload(node) not in (aten.view.default, aten.reshape.default)
            else _rows(step.inputs[0], window)
        )
        waiting += [(n, rows) for n in step.inputs]
    changed = True
    while changed:
        # A value that others read as well stays whole, and so does what is in rows before it is one by one.
        stay = [
            n
            for n, step in steps.items()
            if any(u is not last and u not in steps for u in n.users)
            or any(_rows(i, window) and i not in steps for i in step.inputs)
        ]
        changed = bool(stay)
        for n in stay:
            del steps[n]
    return steps if full in steps else {}


def _rows(node: fx.Node, window: _Window) -> bool:
    s = spec(node)
    return s is not None and len(s.shape) == 2 and s.shape[0] == window.batch * window.size


def _has_positions(node: fx.Node, window: _Window) -> bool:
    s = spec(node)
    return s is not None and len(s.shape) >= 3 and s.shape[:2] == (window.batch, window.size)


def _step(node: fx.Node, in_rows: bool, window: _Window) -> _Step | None:
    """None for a call that mixes positions, or that we do not know."""
    op, here = overload(node), spec(node)
    fits = _rows if in_rows else _has_positions
    if here is None or op is None or not fits(node, window):
        return None
    if op in (aten.view.default, aten.reshape.default):
        source = node.args[0]
        assert isinstance(source, fx.Node)
        before = spec(source)
        if before is None or makes_memory(node):
            return None
        # The positions stay whole: rows to positions or back, or what comes after them in other groups.
        if _rows(source, window) or _has_positions(source, window):
            return _Step((source,), in_rows)
        return None
    if op in _NORMS:
        # Over less than the positions, which the weight has no place for either.
        if len(argument(node, "normalized_shape")) > len(here.shape) - (1 if in_rows else 2):
            return None
        return _taking(node, (node.args[0],), fits, in_rows, window)
    if op is aten.linear.default:
        return _taking(node, (node.args[0],), fits, in_rows, window)
    if op is aten.matmul.default:
        b = spec(node.args[1])  # type: ignore[arg-type]
        return _taking(node, (node.args[0],), fits, in_rows, window) if b and len(b.shape) == 2 else None
    if op is aten.addmm.default and in_rows:
        bias = spec(node.args[0])  # type: ignore[arg-type]
        if bias is None or len(bias.shape) != 1:
            return None
        return _taking(node, (node.args[1],), fits, in_rows, window)
    if op is aten.mm.default and in_rows:
        return _taking(node, (node.args[0],), fits, in_rows, window)
    if op in _UNARY:
        return _taking(node, (node.args[0],), fits, in_rows, window)
    if op in _BINARY:
        varying = []
        for a in node.args:
            if not isinstance(a, fx.Node):
                continue
            s = spec(a)
            if s is None:
                return None
            if len(s.shape) == len(here.shape):
                varying.append(a)
            elif len(s.shape) > 1:
                return None
        return _taking(node, tuple(varying), fits, in_rows, window)
    return None


def _taking(node: fx.Node, inputs: tuple, fits: Any, in_rows: bool, window: _Window) -> _Step | None:
    if not inputs or not all(isinstance(n, fx.Node) and fits(n, window) for n in inputs):
        return None
    return _Step(inputs, in_rows)


def _view_of_window(node: fx.Node, in_rows: bool, window: _Window) -> list[int]:
    s = spec(node)
    assert s is not None
    if in_rows:
        return [window.batch * window.length, *s.shape[1:]]
    return [window.batch, window.length, *s.shape[2:]]


def _fits(old: fx.Node, new: fx.Node) -> bool:
    """Whether all that reads the slice makes of the new one what it made of the old one."""
    before, after = spec(old), spec(new)
    assert before is not None and after is not None
    if same_geometry(before, after):
        return True
    if before.shape != after.shape or before.dtype != after.dtype or old in kept(old.graph):
        return False
    for reader in old.users:
        if spec(reader) is None or overload(reader) is None:
            return False
        args = fx.map_arg(reader.args, lambda n: new if n is old else n)
        try:
            made = infer(reader.target, args, dict(reader.kwargs))  # type: ignore[arg-type]
        except (RuntimeError, AssertionError):
            return False
        if not same_geometry(made, spec(reader)):
            return False
    return True
