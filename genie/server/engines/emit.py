"""From a specialised program to one Python function, an op a line, each value dropped after its last use."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from genie.server.fastcalls import fast_call

Run = Callable[[list[Tensor]], list[Tensor | None]]


def emit(graph: fx.Graph) -> Run:
    """A function from the list of the placeholders' values to the list of kept values."""
    scope: dict[str, Any] = {}
    interned: dict[Any, str] = {}
    nodes = list(graph.nodes)
    last: dict[fx.Node, int] = {}
    for i, node in enumerate(nodes):
        last[node] = i
        for used in node.all_input_nodes:
            last[used] = i
    dead: list[list[fx.Node]] = [[] for _ in nodes]
    for node, i in last.items():
        dead[i].append(node)

    def constant(value: Any) -> str:
        name = interned.get(id(value))
        if name is None:
            name = interned[id(value)] = f"k{len(scope)}"
            scope[name] = value
        return name

    def text(value: Any) -> str:
        if isinstance(value, fx.Node):
            return value.name
        if isinstance(value, list):
            return f"[{', '.join(map(text, value))}]"
        if isinstance(value, tuple):
            return f"({''.join(text(v) + ', ' for v in value)})"
        if value is None or value is True or value is False or type(value) is int:
            return repr(value)
        return constant(value)

    inputs = [n for n in nodes if n.op == "placeholder"]
    names = "".join(f"{n.name}, " for n in inputs)
    lines = ["def run(E):", f" {names}= E" if names else " pass"]
    for i, node in enumerate(nodes):
        if node.op == "placeholder":
            continue
        if node.op == "output":
            lines.append(f" return {text(list(node.args[0]))}")
            continue
        if node.op != "call_function":
            raise ValueError(f"a specialised program cannot hold a {node.op}")
        if node.target is operator.getitem:
            line = f"{node.name} = {text(node.args[0])}[{node.args[1]}]"
        else:
            parts = [text(a) for a in node.args]
            # An op may have an argument called "self" or "from": no keywords in source.
            parts += [f"**{{{key!r}: {text(value)}}}" for key, value in node.kwargs.items()]
            line = f"{node.name} = {constant(_callable(node.target))}({', '.join(parts)})"
        drop = [n.name for n in dead[i] if nodes[-1] is not n]
        if drop:
            line += "; " + " = ".join(drop) + " = None"
        lines.append(" " + line)
    exec(compile("\n".join(lines), "<genie engine>", "exec"), scope)
    return scope["run"]


def _callable(target: Any) -> Any:
    if isinstance(target, torch._ops.OpOverload):
        return fast_call(f"{target._schema.name}.{target._overloadname}", target)
    return target
