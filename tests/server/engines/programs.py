"""Programs at fixed shapes that no model is needed for."""

from __future__ import annotations

import operator

import torch
from torch import Tensor, fx

aten = torch.ops.aten
STACK_WIDTH = 32
HEADS, CAPACITY = 2, 16


def stack(layers: int, *, in_place: bool = False) -> fx.Graph:
    """Layers that norm, write to a cache, attend and add twice to a residual stream. Placeholders: the stream
    (rows, 1, width), the position, and for each layer two norms' weights, four matrices and two caches.
    ``in_place``: products are added into the stream."""
    graph = fx.Graph()
    x, position = graph.placeholder("x"), graph.placeholder("position")
    weights = [[graph.placeholder(f"w{i}_{k}") for k in range(8)] for i in range(layers)]
    call = graph.call_function
    width = STACK_WIDTH
    stream = call(aten.mul.Tensor, (x, 2.0))

    def add(stream: fx.Node, rows: fx.Node, matrix: fx.Node) -> fx.Node:
        if not in_place:
            return call(aten.add.Tensor, (stream, call(aten.linear.default, (rows, matrix))))
        into = call(aten.view.default, (stream, [-1, width]))
        flat = call(aten.view.default, (rows, [-1, rows.meta["width"]]))
        total = call(aten.addmm_.default, (into, flat, call(aten.t.default, (matrix,))))
        return call(aten.view.default, (total, [-1, 1, width]))

    for norm1, norm2, qkv, out, up, down, keys, values in weights:
        normed = call(aten.layer_norm.default, (stream, [width], norm1, None, 1e-5))
        three = call(aten.split.Tensor, (call(aten.linear.default, (normed, qkv)), width, 2))
        heads = []
        for k in range(3):
            one = call(
                aten.view.default,
                (call(operator.getitem, (three, k)), [-1, 1, HEADS, width // HEADS]),
            )
            heads.append(call(aten.transpose.int, (one, 1, 2)))
        keys = call(aten.index_copy_.default, (keys, 2, position, heads[1]))
        values = call(aten.index_copy_.default, (values, 2, position, heads[2]))
        seen = call(aten.scaled_dot_product_attention.default, (heads[0], keys, values))
        rows = call(aten.reshape.default, (call(aten.transpose.int, (seen, 1, 2)), [-1, 1, width]))
        rows.meta["width"] = width
        stream = add(stream, rows, out)
        normed = call(aten.layer_norm.default, (stream, [width], norm2, None, 1e-5))
        rows = call(aten.gelu.default, (call(aten.linear.default, (normed, up)),))
        rows.meta["width"] = 2 * width
        stream = add(stream, rows, down)
    graph.output([call(aten.layer_norm.default, (stream, [width], None, None, 1e-5)), None])
    graph.lint()
    return graph


def stack_inputs(layers: int, rows: int = 1) -> list[Tensor]:
    """What the placeholders of `stack` are bound to."""
    made = torch.Generator().manual_seed(layers)
    width = STACK_WIDTH

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=made) * 0.3

    args = [normal(rows, 1, width), torch.zeros(1, dtype=torch.int64)]
    for _ in range(layers):
        args += [torch.ones(width), torch.ones(width), normal(3 * width, width), normal(width, width)]
        args += [normal(2 * width, width), normal(width, 2 * width)]
        args += [torch.zeros(rows, HEADS, CAPACITY, width // HEADS) for _ in range(2)]
    return args
