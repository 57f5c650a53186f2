"""From a graph that Dynamo traced to a program template, once: `lower`.

The graph is run on Dynamo's own fake tensors while a dispatch mode writes down the operations, as the
recorder would have recorded them: the same ops, whole composites, program order, real mutation. Sizes
that Dynamo keeps symbolic stay expressions, and guards that shape inference adds join Dynamo's.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from genie.frontend import composites
from genie.frontend.entries import Entry
from genie.frontend.replay.capture import CannotLowerError, Capture, Geometry, Layouts, Output
from genie.frontend.replay.symbols import SymbolicLiteral
from genie.frontend.specs import Spec
from genie.frontend.tensor import LazyTensor

aten = torch.ops.aten


@dataclass
class Lowered:
    """A program template with what binds it to a call."""

    code: bytes
    kept: bytes
    n_slots: int
    literals: list[int]
    floats: list[float]
    entries: list[Entry]
    made: list[list[Geometry]]  # by instruction: its new tensors
    stacks: list[str]
    #: indices of the graph's arguments that are tensors: the externals, in order; then come ``attributes``
    tensors: list[int]
    #: what each of them must look like, None where sizes are symbolic
    expected: list[Spec | None]
    #: tensors that the graph holds: parameters, and constants that it made
    attributes: list[LazyTensor]
    #: those of them that are made wherever the graph is lowered
    constants: list[LazyTensor]
    outputs: list[Output]
    #: externals that the program writes to, by number
    mutated: list[int]
    #: values whose layout the server must keep whatever the sizes are: see `TemplateBody`
    layouts: list[tuple[int, list[int]]]
    #: where a symbol's value stands: (symbol, argument, dimension of that tensor or -1 for the int itself)
    symbols: list[tuple[Any, int, int]] = field(default_factory=list)


def lower(gm: torch.fx.GraphModule, layouts: Layouts) -> Lowered:
    """Raises CannotLowerError, UnboundSymbolError for a size that depends on data, or what shape inference
    raises."""
    placeholders = [n for n in gm.graph.nodes if n.op == "placeholder"]
    values = [n.meta.get("example_value") for n in placeholders]
    fakes = [v for v in values if isinstance(v, FakeTensor)]
    if not fakes:
        raise CannotLowerError("no argument is a tensor")
    mode = fakes[0].fake_mode
    capture = Capture(mode, layouts)
    tensors = []
    for index, value in enumerate(values):
        if isinstance(value, FakeTensor):
            capture.external(value)
            tensors.append(index)
        elif not isinstance(value, (torch.SymInt, int)):
            raise CannotLowerError(f"argument {index} is a {type(value).__name__}")
    for submodule in gm.children():
        raise CannotLowerError(f"the graph calls a {type(submodule).__name__} (a higher-order op)")
    with composites.observed_by(capture), mode, capture:
        result = _Interpreter(gm, capture).run(*values)
    outputs = [capture.output(v, values) for v in result]
    kept = sorted({o.number for o in outputs if o.kind == "slot" and o.number >= 0})
    return Lowered(
        code=array("i", capture.code).tobytes(),
        kept=array("i", kept).tobytes(),
        n_slots=capture.n_slots,
        literals=capture.literals,
        floats=capture.floats,
        entries=capture.entries,
        made=capture.made,
        stacks=capture.stacks,
        tensors=tensors,
        expected=[_fixed_spec(values[i]) for i in tensors],
        attributes=capture.attributes,
        constants=capture.constants,
        outputs=outputs,
        mutated=sorted(capture.mutated),
        layouts=capture.kept_layouts({o.root for o in outputs if o.kind == "slot"}),
        symbols=_sources(values),
    )


def _fixed_spec(fake: FakeTensor) -> Spec | None:
    geometry = Geometry.of(fake)
    if any(isinstance(n, SymbolicLiteral) for n in geometry.sizes):
        return None
    return geometry.spec(geometry.sizes)


def _sources(values: Sequence[Any]) -> list[tuple[Any, int, int]]:
    """Each symbol once, with a place among the arguments where its value can be read."""
    found: dict[Any, tuple[Any, int, int]] = {}
    for index, value in enumerate(values):
        if isinstance(value, torch.SymInt):
            expr = value.node.expr
            if expr.is_Symbol:
                found.setdefault(expr, (expr, index, -1))
        elif isinstance(value, FakeTensor):
            for dim, size in enumerate(value.shape):
                if isinstance(size, torch.SymInt) and size.node.expr.is_Symbol:
                    found.setdefault(size.node.expr, (size.node.expr, index, dim))
    return list(found.values())


class _Interpreter(torch.fx.Interpreter):
    def __init__(self, gm: torch.fx.GraphModule, capture: Capture) -> None:
        super().__init__(gm, garbage_collect_values=False)
        self._capture = capture

    def run_node(self, n: torch.fx.Node) -> Any:
        if n.op == "call_function" and isinstance(n.target, torch._ops.HigherOrderOperator):
            raise CannotLowerError(f"the graph calls the higher-order op {n.target}")
        if n.target is torch._C._set_grad_enabled and n.args[0]:
            raise CannotLowerError("the graph switches gradients on")
        self._capture.stack = n.meta.get("stack_trace") or ""
        return super().run_node(n)

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        value = super().get_attr(target, args, kwargs)
        if isinstance(value, LazyTensor):
            return self._capture.attribute(value)
        if isinstance(value, Tensor):
            raise CannotLowerError("the graph holds a CPU tensor")
        return value
