"""What a pass must know of a value before it touches it: who writes to its memory, who keeps it, what an op
makes."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import fx

from genie.server.engines.specialize import Spec, _ordered

aten = torch.ops.aten

#: views of one tensor that never move its first element when they leave shape and strides as they are
VIEWS = frozenset(
    {
        aten.alias.default, aten.contiguous.default, aten.detach.default, aten.expand.default,
        aten.flatten.using_ints, aten.permute.default, aten.reshape.default, aten.slice.Tensor,
        aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.t.default, aten.transpose.int,
        aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten.unsqueeze.default, aten.view.default,
        aten._unsafe_view.default,
    }
)  # fmt: skip
_STATISTICS = ("running_mean", "running_var")


def kept(graph: fx.Graph) -> list[fx.Node | None]:
    """The values that outlive the program, in order."""
    return list(graph.output_node().args[0])  # type: ignore[arg-type]


def spec(node: fx.Node) -> Spec | None:
    """None for a call that returns several values: its `getitem`s have theirs."""
    return node.meta.get("spec")


def storages(nodes: Iterable[fx.Node | None]) -> set[int]:
    found = {s.storage for n in nodes if n is not None and (s := spec(n)) is not None}
    return found


def overload(node: Any) -> torch._ops.OpOverload | None:
    target = node.target if isinstance(node, fx.Node) else None
    return target if isinstance(target, torch._ops.OpOverload) else None


def argument(node: fx.Node, name: str) -> Any:
    """The value of an argument by its name in the schema, the default where it is not given."""
    op = overload(node)
    assert op is not None
    for position, a in enumerate(op._schema.arguments):
        if a.name == name:
            if position < len(node.args) and not a.kwarg_only:
                return node.args[position]
            return node.kwargs.get(name, a.default_value)
    raise KeyError(f"{op} has no argument {name}")


def written(node: fx.Node) -> list[fx.Node]:
    """The values whose memory the call writes to. Normalisations write to their running statistics, which
    their schemas do not say."""
    op = overload(node)
    if op is None:
        return []
    names = [a.name for a in op._schema.arguments]
    training = next((argument(node, n) for n in ("training", "train", "use_input_stats") if n in names), None)
    found: list[fx.Node] = []
    for a in op._schema.arguments:
        if (a.alias_info is not None and a.alias_info.is_write) or (a.name in _STATISTICS and training):
            value = argument(node, a.name)
            found += [v for v in (value if isinstance(value, (list, tuple)) else [value]) if v is not None]
    return found


def written_storages(graph: fx.Graph) -> set[int]:
    return storages(v for node in graph.nodes for v in written(node))


def is_pure(node: fx.Node) -> bool:
    """Whether the same arguments always make the same values, and nothing else happens."""
    op = overload(node)
    if op is None:
        return node.op == "call_function" and node.target in (operator.getitem, _ordered)
    if written(node) or not op._schema.returns:
        return False
    if torch.Tag.nondeterministic_seeded in op.tags:
        return "dropout_p" in {a.name for a in op._schema.arguments} and argument(node, "dropout_p") == 0
    return op.namespace == "aten"


def makes_memory(node: fx.Node) -> bool:
    """Whether the call runs a kernel, rather than only naming memory anew."""
    if node.op != "call_function":
        return False
    if written(node):
        return True
    if overload(node) is None:
        return False  # getitem; an ordered copy costs nothing where the order is already right
    outputs = [n for n in node.users if spec(node) is None] or [node]
    return bool(storages(outputs) - storages(node.all_input_nodes))


def kernels(graph: fx.Graph) -> int:
    """How many calls of the program make or change memory: kernels, where each op is one."""
    return sum(makes_memory(n) for n in graph.nodes)


def same_geometry(a: Spec | None, b: Spec | None) -> bool:
    """Equal shape, dtype and strides; a stride along which there is one element at most does not count."""
    if a is None or b is None:
        return a is b
    return (
        a.shape == b.shape
        and a.dtype == b.dtype
        and all(n <= 1 or s == t for n, s, t in zip(a.shape, a.stride, b.stride, strict=True))
    )


def is_dense(s: Spec) -> bool:
    """Contiguous: row by row without gaps."""
    step = 1
    for n, stride in zip(reversed(s.shape), reversed(s.stride), strict=True):
        if n != 1:
            if stride != step:
                return False
            step *= n
    return True


class _Empty(NamedTuple):
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype


def infer(op: Callable, args: Sequence[Any], kwargs: dict[str, Any], storage: int = -1) -> Spec:
    """What the op makes of values with these specs, by its meta kernel. Raises what that raises."""
    shape, stride, dtype = _inferred(op, _frozen(args), _frozen(sorted(kwargs.items())))
    return Spec(shape, stride, dtype, storage)


@lru_cache(4096)
def _inferred(op: Callable, args: Any, kwargs: Any) -> _Empty:
    made = op(*_thawed(args), **dict(_thawed(kwargs)))
    return _Empty(tuple(made.shape), made.stride(), made.dtype)


def _frozen(value: Any) -> Any:
    """Hashable, with 1, 1.0 and True kept apart; the layers of a model ask the same."""
    if isinstance(value, fx.Node):
        s = spec(value)
        assert s is not None
        return _Empty(s.shape, s.stride, s.dtype)
    if isinstance(value, (list, tuple)):
        return list, tuple(map(_frozen, value))
    return type(value), value


def _thawed(value: Any) -> Any:
    if isinstance(value, _Empty):
        return torch.empty_strided(value.shape, value.stride, dtype=value.dtype, device="meta")
    kind, content = value
    return [_thawed(v) for v in content] if kind is list else content


#: of memory that a rewrite adds: no number that an observation gives, nor that of unknown memory
_fresh_storages = itertools.count(-2, -1)


def insert(
    at: fx.Node,
    op: Callable,
    args: Sequence[Any],
    kwargs: dict[str, Any] | None = None,
    *,
    view: bool = False,
) -> fx.Node:
    """A new call before ``at``, with its spec; a view's memory is that of its first argument."""
    kwargs = kwargs or {}
    base = spec(args[0]) if view else None
    made = infer(op, args, kwargs, base.storage if base is not None else next(_fresh_storages))
    with at.graph.inserting_before(at):
        node = at.graph.call_function(op, tuple(args), kwargs)
    node.meta.update(spec=made, instruction=at.meta.get("instruction"))
    return node


def replaced(root: fx.Node, op: Callable, args: Sequence[Any], kwargs: dict[str, Any] | None = None) -> bool:
    """Puts one call in the place of ``root``. False, and nothing changed, if it makes another geometry."""
    kwargs = kwargs or {}
    old = spec(root)
    if old is None or not same_geometry(infer(op, args, kwargs), old):
        return False
    with root.graph.inserting_before(root):
        node = root.graph.call_function(op, tuple(args), kwargs)
    node.meta.update(spec=old, instruction=root.meta.get("instruction"))
    root.replace_all_uses_with(node)
    root.graph.erase_node(root)
    return True


def erase_unread(nodes: Iterable[fx.Node]) -> None:
    """Erases those of the calls, last first, that nobody reads any more."""
    for node in sorted(set(nodes), reverse=True):
        if not node._erased and not node.users and is_pure(node):
            node.graph.erase_node(node)
