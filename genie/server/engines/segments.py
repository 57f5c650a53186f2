"""A program at fixed shapes cut into segments, the same segment wherever the program repeats itself.

A model's layers are equal but for their weights, so that what is compiled for one serves all of them. The cut
is made right behind a matrix product, where a compiler could not have fused anyway; among these, where the
fewest values cross it. A segment is text: JSON with the geometry of what it takes, its calls and what it
returns, so that another process can compile it, equal segments have equal text, and people can read it.
"""

from __future__ import annotations

import json
import operator
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, fx

from genie.server.engines.kv import attend, mask_until
from genie.server.engines.rewrite.facts import VIEWS, written
from genie.server.engines.specialize import Spec, _ordered

aten = torch.ops.aten
#: of one segment; compiling takes about 10 ms a call
MOST_CALLS = 200
#: what compiling segments of one program may cost, in calls: what repeats counts once
MOST_DISTINCT_CALLS = 500
#: lengths of repeats that are tried
MOST_PERIODS = 16
#: values that may cross a cut behind a product rather than one elsewhere
PRODUCT_BONUS = 1.5

PRODUCTS = frozenset(
    {
        aten.linear.default, aten.addmm.default, aten.mm.default, aten.bmm.default, aten.matmul.default,
        aten.baddbmm.default, aten.addmm_.default, aten.conv1d.default, aten.conv2d.default,
        aten.conv3d.default, aten.convolution.default, aten.scaled_dot_product_attention.default, attend,
    }
)  # fmt: skip
_FUNCTIONS: dict[str, Callable] = {
    f"{f.__module__}.{f.__name__}": f for f in (attend, mask_until, _ordered, operator.getitem)
}


class NotCompilableError(Exception):
    """Why a program is not compiled."""


class Facts:
    """What one run of a program at fixed shapes made: the spec of every value that is a tensor."""

    def __init__(self) -> None:
        self.specs: dict[fx.Node, Spec] = {}
        self._numbers: dict[int, int] = {}  # of the storages that are alive, by address
        self._alive: Counter[int] = Counter()
        self._storages = 0

    def see(self, node: fx.Node, value: Any, device: torch.device) -> None:
        if not isinstance(value, Tensor):
            return
        if value.device != device:
            raise NotCompilableError(f"{node.target} makes a tensor on {value.device}")
        key = value.untyped_storage()._cdata
        if key not in self._numbers:
            self._numbers[key] = self._storages
            self._storages += 1
        self._alive[key] += 1
        self.specs[node] = Spec(tuple(value.shape), value.stride(), value.dtype, self._numbers[key])

    def forget(self, value: Any) -> None:
        """Before the value is dropped: its storage's address may be another's next."""
        if isinstance(value, Tensor):
            key = value.untyped_storage()._cdata
            self._alive[key] -= 1
            if not self._alive[key]:
                del self._alive[key], self._numbers[key]


def observe(graph: fx.Graph, args: Sequence[Tensor], device: torch.device) -> Facts:
    """Runs the program call by call on the placeholders' values in order. Raises NotCompilableError."""
    facts, values = Facts(), dict[fx.Node, Any]()
    nodes = list(graph.nodes)
    last = {used: node for node in nodes for used in node.all_input_nodes}
    given = iter(args)
    for node in nodes:
        if node.op == "output":
            break
        if node.op == "placeholder":
            values[node] = next(given)
        else:
            values[node] = node.target(
                *fx.map_arg(node.args, values.__getitem__), **fx.map_arg(node.kwargs, values.__getitem__)
            )
        facts.see(node, values[node], device)
        for used in {node, *node.all_input_nodes}:
            if last.get(used, node) is node:
                facts.forget(values.pop(used))
    return facts


@dataclass
class Segment:
    """Calls that follow each other. ``text``: equal for segments that compute the same."""

    calls: list[fx.Node]
    inputs: list[fx.Node]
    outputs: list[fx.Node]
    text: str


def segments(graph: fx.Graph, facts: Facts) -> list[Segment]:
    """The whole program in order. It may be changed where it writes in place without need.

    Raises NotCompilableError."""
    _out_of_place(graph, facts)
    units = _units(graph)
    cuts = [0, *_cuts(graph, units, facts), len(units)]
    found = [_segment([n for unit in units[a:b] for n in unit], facts) for a, b in pairwise(cuts) if a < b]
    distinct = {s.text: len(s.calls) for s in found}
    if max(distinct.values(), default=0) > MOST_CALLS or sum(distinct.values()) > MOST_DISTINCT_CALLS:
        raise NotCompilableError(f"{sum(distinct.values())} calls of it are unlike each other")
    return found


def share_to_gain(graph: fx.Graph, facts: Facts, bandwidth: float, flops: float, kernel_s: float) -> float:
    """Of the program's estimated seconds, those in kernels that a compiler could fuse: neither products nor
    convolutions nor attention. ``bandwidth`` in bytes/s; ``kernel_s``: the least that a kernel takes."""
    products = others = 0.0
    for node in graph.nodes:
        if node.op != "call_function" or node.target in VIEWS or node.target is operator.getitem:
            continue
        specs = [facts.specs[n] for n in (*node.all_input_nodes, node) if n in facts.specs]
        if node in facts.specs and not written(node):
            shared = facts.specs[node].storage
            if any(s.storage == shared for s in specs[:-1]):
                continue  # a view
        seconds = max(kernel_s, sum(map(_nbytes, specs)) / bandwidth)
        if node.target in PRODUCTS:
            products += max(seconds, _flops(node, facts) / flops)
        else:
            others += seconds
    return others / (products + others) if products + others else 0.0


def _nbytes(spec: Spec) -> int:
    count = 1
    for n, stride in zip(spec.shape, spec.stride, strict=True):
        count *= n if stride else 1
    return count * spec.dtype.itemsize


def _flops(node: fx.Node, facts: Facts) -> float:
    """2 x what it makes x what is summed for each: the weight's elements by output channel."""
    made = facts.specs.get(node)
    inputs = [facts.specs[n] for n in node.all_input_nodes if n in facts.specs]
    if made is None or len(inputs) < 2:
        return 0.0
    matrix = max((s for s in inputs if len(s.shape) > 1), key=_nbytes, default=inputs[-1])
    channels = max((n for n in matrix.shape if n in made.shape), default=1)
    return 2.0 * _numel(made) * _numel(matrix) / max(1, channels)


def _numel(spec: Spec) -> int:
    count = 1
    for n in spec.shape:
        count *= n
    return count


# -- cutting ---------------------------------------------------------------------------------------


def _units(graph: fx.Graph) -> list[list[fx.Node]]:
    """The calls, each with the `getitem`s of what it returns: no list crosses a cut."""
    found: list[list[fx.Node]] = []
    at: dict[fx.Node, list[fx.Node]] = {}
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        if node.target is operator.getitem:
            at[node.all_input_nodes[0]].append(node)
        else:
            at[node] = [node]
            found.append(at[node])
    return found


def _cuts(graph: fx.Graph, units: list[list[fx.Node]], facts: Facts) -> list[int]:
    """Numbers of the units that segments begin with, between the first and the last."""
    names: dict[str, int] = {}
    kinds = [names.setdefault(_kind(unit[0], facts), len(names)) for unit in units]
    start, period, repeats = _repeat(kinds)
    if repeats < 2:
        return []
    order = {n: i for i, unit in enumerate(units) for n in unit}
    last = {n: max((order.get(u, len(units)) for u in n.users), default=-1) for n in order}
    products = {facts.specs[u[0]].storage for u in units if u[0].target in PRODUCTS and u[0] in facts.specs}

    def cost(offset: int) -> float:
        at = start + offset + period * ((repeats - 1) // 2)
        crossing = sum(1 for n, i in order.items() if i < at <= last[n] and n in facts.specs)
        before = units[at - 1][0] if at else None
        behind_product = before in facts.specs and facts.specs[before].storage in products
        return crossing - (PRODUCT_BONUS if behind_product else 0.0)

    offset = min(range(period), key=cost)
    end = start + period * repeats
    return [i for i in range(start + offset, end + 1, period) if 0 < i < len(units)]


def _kind(node: fx.Node, facts: Facts) -> str:
    def one(n: fx.Node) -> str:
        spec = facts.specs.get(n)
        return "" if spec is None else f"{spec.shape}{spec.stride}{spec.dtype}"

    return f"{node.target} {fx.map_arg((node.args, node.kwargs), lambda n: one(n))} {one(node)}"


def _repeat(kinds: Sequence[int]) -> tuple[int, int, int]:
    """(start, period, repeats) of the repetition that covers most; repeats 1 where there is none."""
    places: dict[int, int] = {}
    periods: Counter[int] = Counter()
    for i, kind in enumerate(kinds):
        if kind in places:
            periods[i - places[kind]] += 1
        places[kind] = i
    best = (0, max(1, len(kinds)), 1)
    for period, _ in sorted(periods.items(), key=lambda p: (-p[1], p[0]))[:MOST_PERIODS]:
        run = 0
        for i in range(len(kinds) - period + 1):
            if i < len(kinds) - period and kinds[i] == kinds[i + period]:
                run += 1
                continue
            repeats = run // period + 1
            covered, of_best = period * repeats, best[1] * best[2] if best[2] > 1 else 0
            if repeats > 1 and (covered > of_best or (covered == of_best and period < best[1])):
                best = (i - run, period, repeats)
            run = 0
    return best


def _out_of_place(graph: fx.Graph, facts: Facts) -> None:
    """``x.addmm_(a, b)`` becomes ``addmm`` where nobody reads x's memory otherwise afterwards: in place it
    saves a copy when it runs as one kernel, but a compiler would have to make that copy."""
    order = {n: i for i, n in enumerate(graph.nodes)}
    sharing: dict[int, list[fx.Node]] = {}
    for node, spec in facts.specs.items():
        sharing.setdefault(spec.storage, []).append(node)
    for node in list(graph.nodes):
        if node.target is not aten.addmm_.default:
            continue
        target = facts.specs[node]
        old = [n for n in sharing[target.storage] if order[n] < order[node]]
        if any(n.op == "placeholder" for n in old):
            continue
        if any(order[user] > order[node] for n in old for user in n.users):
            continue
        node.target = aten.addmm.default
        fresh = 1 + max(sharing)
        moved = [n for n in sharing[target.storage] if order[n] >= order[node]]
        sharing[target.storage], sharing[fresh] = old, moved
        for n in moved:
            s = facts.specs[n]
            facts.specs[n] = Spec(s.shape, s.stride, s.dtype, fresh)


# -- segments as text ------------------------------------------------------------------------------


def _segment(calls: list[fx.Node], facts: Facts) -> Segment:
    inside = set(calls)
    inputs = list(dict.fromkeys(n for c in calls for n in c.all_input_nodes if n not in inside))
    outputs = [c for c in calls if any(u not in inside for u in c.users)]
    _check_memory(calls, inputs, outputs, facts)
    names = {n: f"i{k}" for k, n in enumerate(inputs)} | {n: f"v{k}" for k, n in enumerate(calls)}
    body = {
        "inputs": [_geometry(facts.specs[n]) for n in inputs],
        "calls": [
            [
                _name(n.target),
                [_encode(a, names) for a in n.args],
                {key: _encode(a, names) for key, a in n.kwargs.items()},
            ]
            for n in calls
        ],
        "outputs": [names[n] for n in outputs],
    }
    return Segment(calls, inputs, outputs, json.dumps(body))


def _check_memory(calls: list[fx.Node], inputs: list[fx.Node], outputs: list[fx.Node], facts: Facts) -> None:
    """What is written to is known to the segment by one name only, and to who comes after it."""
    specs = facts.specs
    if any(n not in specs for n in (*inputs, *outputs)):
        raise NotCompilableError("something other than tensors crosses a cut")
    touched = {specs[v].storage for c in calls for v in written(c) if v in specs}
    for values in (inputs, outputs):
        names = Counter(specs[n].storage for n in values)
        if any(names[s] > 1 for s in touched):
            raise NotCompilableError("it writes to memory that it knows by several names")


def _geometry(spec: Spec) -> list:
    return [list(spec.shape), list(spec.stride), str(spec.dtype)]


def _name(target: Any) -> str:
    if isinstance(target, torch._ops.OpOverload) and target.namespace == "aten":
        return str(target)
    name = f"{target.__module__}.{target.__name__}"
    if name not in _FUNCTIONS:
        raise NotCompilableError(f"{name} is no op of torch's own")
    return name


def _encode(value: Any, names: dict[fx.Node, str]) -> Any:
    if isinstance(value, fx.Node):
        return {"value": names[value]}
    if isinstance(value, (list, tuple)):
        return [_encode(v, names) for v in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (torch.dtype, torch.layout, torch.memory_format)):
        return {"torch": str(value).removeprefix("torch.")}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    raise NotCompilableError(f"an argument of type {type(value).__name__}")


def from_text(text: str) -> tuple[fx.GraphModule, list[Spec]]:
    """The segment's module and what it takes. It returns a list."""
    body = json.loads(text)
    graph = fx.Graph()
    inputs = [Spec(tuple(shape), tuple(stride), _attribute(dtype)) for shape, stride, dtype in body["inputs"]]
    values = {f"i{k}": graph.placeholder(f"i{k}") for k in range(len(inputs))}

    def decode(value: Any) -> Any:
        if isinstance(value, list):
            return [decode(v) for v in value]
        if not isinstance(value, dict):
            return value
        ((kind, payload),) = value.items()
        if kind == "value":
            return values[payload]
        return torch.device(payload) if kind == "device" else _attribute(payload)

    for k, (target, args, kwargs) in enumerate(body["calls"]):
        decoded = {key: decode(a) for key, a in kwargs.items()}
        values[f"v{k}"] = graph.call_function(_target(target), tuple(map(decode, args)), decoded)
    graph.output([values[name] for name in body["outputs"]])
    return fx.GraphModule(torch.nn.Module(), graph), inputs


def _target(name: str) -> Callable:
    if name in _FUNCTIONS:
        return _FUNCTIONS[name]
    namespace, op, overload = name.split(".")
    return getattr(getattr(getattr(torch.ops, namespace), op), overload)


def _attribute(name: str) -> Any:
    return getattr(torch, name.removeprefix("torch."))


def joined(graph: fx.Graph, parts: Iterable[Segment], compiled: dict[str, Callable]) -> fx.Graph:
    """The program that calls ``compiled[text]`` for each segment that is there, and the rest call by call."""
    whole = fx.Graph()
    values: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        if node.op == "placeholder":
            values[node] = whole.placeholder(node.name)
    for part in parts:
        run = compiled.get(part.text)
        if run is None:
            for node in part.calls:
                values[node] = whole.node_copy(node, values.__getitem__)
            continue
        call = whole.call_function(run, tuple(values[n] for n in part.inputs))
        for k, node in enumerate(part.outputs):
            values[node] = whole.call_function(operator.getitem, (call, k))
    whole.output(fx.map_arg(graph.output_node().args[0], values.__getitem__))
    return whole
