"""From a recorded program to its graph. Nothing is recognised here: see `genie.semantics`."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from genie.frontend.entries import definition
from genie.frontend.program import Program
from genie.frontend.specs import Spec, to_wire
from genie.srg.cost import cost
from genie.srg.graph import Cost, Edge, Graph, Node, Origin, base_name, nbytes
from genie.wire.messages import TensorSpec

_NOTHING = Cost(0, 0)


@dataclass(frozen=True)
class External:
    """What is known of one of ``program.ext`` where the program runs."""

    spec: TensorSpec
    origin: Origin


@dataclass(frozen=True)
class _Shape:
    """What an op definition says about every instruction that uses it."""

    tensors: int
    floats: int
    new: int
    written: tuple[int, ...]  # positions among the tensor arguments
    signature: bytes


@lru_cache(maxsize=65_536)
def _shape(tid: int) -> _Shape:
    d = definition(tid)
    tensors = floats = 0
    for pattern in (*d.args, *d.kwargs.values()):
        kind = pattern[0]
        if kind == "t":
            tensors += 1
        elif kind == "tl":
            tensors += pattern[1]
        elif kind == "ol":
            tensors += sum(pattern[1])
        elif kind == "f":
            floats += 1
        elif kind == "fl":
            floats += pattern[1]
    written = tuple(sorted({o for o in d.outs if o >= 0}))
    signature = repr((d.op, d.args, d.kwargs, d.outs)).encode()
    return _Shape(tensors, floats, d.outs.count(-1), written, signature)


def build(program: Program, externals: Sequence[External], fetch: Sequence[int] = ()) -> Graph:
    """The graph of ``program``. ``externals`` describe ``program.ext`` in order; ``fetch`` are the
    handles that the client reads. A pure function: the same arguments give an equal graph.
    """
    if len(externals) != program.n_ext:
        raise ValueError(f"{len(externals)} externals described, but the program has {program.n_ext}")
    code, kept = array("i"), array("i")
    code.frombytes(program.key[0])
    kept.frombytes(program.key[1])
    leaves = set(kept) | {h - program.base for h in fetch if h >= program.base}
    wire: dict[Spec, TensorSpec] = {}
    specs: dict[int, TensorSpec | None] = {-k - 1: e.spec for k, e in enumerate(externals)}
    sizes: dict[int, int] = {v: nbytes(s) for v, s in specs.items()}
    made_by: dict[int, int] = {v: v for v in specs}
    root: dict[int, int] = {v: v for v in specs}
    writer: dict[int, int] = {}  # root -> the last instruction that wrote to its storage
    nodes: list[Node] = []
    edges: list[Edge] = []
    h = hashlib.sha256()
    at = value = float_at = 0
    for number, entry in enumerate(program.entries):
        shape = _shape(entry.tid)
        end = at + 1 + shape.tensors
        inputs = tuple(code[at + 1 : end])
        h.update(shape.signature)
        h.update(code[at + 1 : end].tobytes())
        at = end
        outputs = tuple(range(value, value + shape.new))
        value += shape.new
        out_specs: tuple[TensorSpec | None, ...]
        if len(entry.outs) == shape.new:
            out_specs = tuple([wire.get(s) or wire.setdefault(s, to_wire(s)) for s in entry.outs])
        else:  # a data-dependent op: its specs come with the reply
            out_specs = (None,) * shape.new
        is_view = entry.views and bool(outputs)
        in_specs = [specs[v] for v in inputs]
        for v in inputs if len(inputs) < 2 else dict.fromkeys(inputs):
            source, last = made_by[v], writer.get(root[v])
            edges.append(Edge(source, number, v, specs[v], sizes[v]))
            if last is not None and last > source:
                edges.append(Edge(last, number, v, specs[v], sizes[v], order=True))
        for v, spec in zip(outputs, out_specs, strict=True):
            specs[v], sizes[v], made_by[v] = spec, nbytes(spec), number
            root[v] = root[inputs[0]] if is_view else v
        writes = tuple([inputs[k] for k in shape.written])
        for v in writes:
            writer[root[v]] = number
        d = definition(entry.tid)
        node_cost = cost(
            base_name(entry.op), d.args, in_specs, out_specs, [specs[v] for v in writes], is_view
        )
        nodes.append(
            Node(
                number, entry.op, d.args, d.kwargs, inputs, entry.literals,
                tuple(program.floats[float_at : float_at + shape.floats]), outputs, out_specs, writes,
                is_view, not leaves.isdisjoint(outputs), node_cost,
            )
        )  # fmt: skip
        float_at += shape.floats
    h.update(array("i", sorted(leaves)).tobytes())
    given = [
        Node(-k - 1, "genie::external", [], {}, (), (), (), (-k - 1,), (e.spec,), (), False,
             program.ext[k] in fetch, _NOTHING, e.origin)
        for k, e in enumerate(externals)
    ]  # fmt: skip
    return Graph(given, nodes, edges, h.digest())
