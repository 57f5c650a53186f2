"""Nodes and samples of a device that follows a roofline exactly."""

from __future__ import annotations

from genie.cost.fit import Sample
from genie.srg.cost import cost
from genie.srg.graph import Node, base_name
from genie.wire.messages import TensorSpec

LAUNCH_S, RATE, BANDWIDTH = 5e-6, 50e9, 10e9


def spec(*shape: int, dtype: str = "float32") -> TensorSpec:
    stride, step = [], 1
    for n in reversed(shape):
        stride.insert(0, step)
        step *= n
    return TensorSpec(dtype, list(shape), stride)


def node(op: str, inputs: list[TensorSpec], output: TensorSpec, is_view: bool = False) -> Node:
    arguments = tuple(range(-len(inputs), 0))
    price = cost(base_name(op), [["t"]] * len(inputs), inputs, [output], [], is_view)
    return Node(
        0, op, [["t"]] * len(inputs), {}, arguments, (), (), (0,), (output,), (), is_view, False, price
    )


def linear(m: int, k: int, n: int, dtype: str = "float32") -> Node:
    inputs = [spec(m, k, dtype=dtype), spec(n, k, dtype=dtype)]
    return node("aten::linear.default", inputs, spec(m, n, dtype=dtype))


def add(elements: int, dtype: str = "float32") -> Node:
    given = spec(elements, dtype=dtype)
    return node("aten::add.Tensor", [given, given], given)


def view(elements: int) -> Node:
    return node("aten::view.default", [spec(elements)], spec(1, elements), is_view=True)


def roofline(n: Node) -> float:
    return LAUNCH_S + max((n.cost.flops or 0) / RATE, n.cost.nbytes / BANDWIDTH)


def sample(n: Node, seconds: float | None = None, held_out: bool = False) -> Sample:
    shape = "x".join(map(str, (n.op, *n.cost.dims)))
    return Sample(shape, (n,), roofline(n) if seconds is None else seconds, n.cost.dtype, held_out)


def samples() -> list[Sample]:
    sizes = (1, 8, 64, 512)
    found = [linear(m, k, n) for m in sizes for k in (64, 512, 2048) for n in (64, 512, 2048)]
    return [sample(n) for n in (*found, *(add(4**i) for i in range(3, 12)))]
