"""From a recorded program to its graph. Nothing is recognised here: see `genie.semantics`."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from genie.frontend.entries import Entry, definition
from genie.frontend.names import Owner
from genie.frontend.program import Program
from genie.frontend.specs import Spec, to_wire
from genie.srg.cost import cost
from genie.srg.graph import Cost, Graph, Node, Origin, Phase, Wiring, base_name, nbytes
from genie.wire.messages import TensorSpec

_NOTHING = Cost(0, 0)
_BYTES = array("i").itemsize


class External(NamedTuple):
    """What is known of one of ``program.ext`` where the program runs. ``owners``: where it is in the
    tree of modules, if it is a weight or a buffer (and with it what `genie.annotate_phase` said there)."""

    spec: TensorSpec
    origin: Origin
    owners: tuple[Owner, ...] = ()


@dataclass(frozen=True)
class _Shape:
    """What an op definition says about every instruction that uses it."""

    args: list
    kwargs: dict[str, list]
    name: str
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
    return _Shape(d.args, d.kwargs, base_name(d.op), tensors, floats, d.outs.count(-1), written, signature)


@dataclass(frozen=True, slots=True)
class _Known:
    """What all instructions of one entry have in common: the sizes of its operands are the entry's."""

    shape: _Shape
    specs: tuple[TensorSpec | None, ...]  # of the new tensors
    nbytes: tuple[int, ...]
    is_view: bool
    cost: Cost


class _Specs:
    """Specs as they are on the wire, one object for all that are equal."""

    def __init__(self) -> None:
        self._by_spec: dict[Spec, TensorSpec] = {}
        self._by_content: dict[tuple, TensorSpec] = {}

    def shared(self, s: TensorSpec) -> TensorSpec:
        return self._by_content.setdefault((s.dtype, s.offset, *s.shape, *s.stride), s)

    def of(self, s: Spec) -> TensorSpec:
        found = self._by_spec.get(s)
        if found is None:
            found = self._by_spec[s] = self.shared(to_wire(s))
        return found


def _known(entry: Entry, specs: _Specs, ins: list[TensorSpec | None]) -> _Known:
    shape = _shape(entry.tid)
    outs: tuple[TensorSpec | None, ...]
    if len(entry.outs) == shape.new:
        outs = tuple([specs.of(s) for s in entry.outs])
    else:  # a data-dependent op: its specs come with the reply
        outs = (None,) * shape.new
    is_view = entry.views and shape.new > 0
    writes = [ins[k] for k in shape.written]
    price = _NOTHING if is_view else cost(shape.name, shape.args, ins, outs, writes, False)
    return _Known(shape, outs, tuple(map(nbytes, outs)), is_view, price)


def build(
    program: Program,
    externals: Sequence[External],
    fetch: Sequence[int] = (),
    blocks: Sequence[tuple[int, int, str]] = (),
) -> Graph:
    """The graph of ``program``. ``externals`` describe ``program.ext`` in order; ``fetch`` are the
    handles that the client reads; ``blocks`` are the annotated ones, instructions counted from the
    program's first. A pure function: the same arguments give an equal graph. Raises ValueError when not
    all externals are described.
    """
    if len(externals) != program.n_ext:
        raise ValueError(f"{len(externals)} externals described, but the program has {program.n_ext}")
    code, kept = array("i"), array("i")
    code.frombytes(program.key[0])
    kept.frombytes(program.key[1])
    leaves = set(kept) | {h - program.base for h in fetch if h >= program.base}
    shared = _Specs()
    wiring = Wiring()
    producer, readers, specs, root = wiring.producer, wiring.readers, wiring.spec, wiring.root
    sizes, by_name, views = wiring.nbytes, wiring.by_name, wiring.views
    given = []
    for k, e in enumerate(externals):
        v = -k - 1
        node = Node(
            v, "genie::external", [], {}, (), (), (), (v,), (shared.shared(e.spec),), (), False,
            program.ext[k] in fetch, _NOTHING, e.origin, owners=e.owners,
        )  # fmt: skip
        given.append(node)
        producer[v], readers[v], specs[v], root[v] = node, [], node.specs[0], v
        sizes[v] = nbytes(node.specs[0])
    nodes: list[Node] = []
    hashed: list[bytes] = []
    entries: dict[int, _Known] = {}
    instructions, numbers, floats = program.key[0], code.tolist(), tuple(program.floats)
    at = value = float_at = 0
    for number, entry in enumerate(program.entries):
        known = entries.get(id(entry))
        if known is None:
            end = at + 1 + _shape(entry.tid).tensors
            known = _known(entry, shared, [specs[v] for v in numbers[at + 1 : end]])
            entries[id(entry)] = known
        shape, is_view = known.shape, known.is_view
        end = at + 1 + shape.tensors
        inputs = tuple(numbers[at + 1 : end])
        hashed += shape.signature, instructions[(at + 1) * _BYTES : end * _BYTES]
        at = end
        if shape.new == 1:
            outputs: tuple[int, ...] = (value,)
            leaf = value in leaves
        else:
            outputs = tuple(range(value, value + shape.new))
            leaf = not leaves.isdisjoint(outputs)
        value += shape.new
        writes = tuple([inputs[k] for k in shape.written]) if shape.written else ()
        node = Node(
            number, entry.op, shape.args, shape.kwargs, inputs, entry.literals,
            floats[float_at : float_at + shape.floats] if shape.floats else (), outputs, known.specs, writes,
            is_view, leaf, known.cost,
        )  # fmt: skip
        float_at += shape.floats
        nodes.append(node)
        if is_view:
            views.append(node)
        if shape.name in by_name:
            by_name[shape.name].append(node)
        else:
            by_name[shape.name] = [node]
        for v in inputs:
            readers[v].append(node)
        for k, v in enumerate(outputs):
            producer[v], readers[v] = node, []
            specs[v], sizes[v] = known.specs[k], known.nbytes[k]
            root[v] = root[inputs[0]] if is_view else v
    hashed.append(array("i", sorted(leaves)).tobytes())
    digest = hashlib.sha256(b"".join(hashed)).digest()
    graph = Graph(given, nodes, digest, [(a, b, Phase(p)) for a, b, p in blocks])
    graph.__dict__["wiring"] = wiring
    return graph
