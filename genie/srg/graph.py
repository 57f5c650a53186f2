"""The semantically rich graph (SRG) of one template: what it computes, and what each part is.

A value has a number: >= 0 for what the program makes (in order), -(k+1) for its k-th external. A node
has one too: >= 0 for an instruction, in program order, -(k+1) for the k-th external itself. The wiring
is fixed when the graph is built; recognizers (`genie.semantics`) fill in phase, residency, modality
and stage. What nothing has recognised stays unknown.

Sizes and costs are those of the program that the template was first seen with: a later one may differ
in its literals (a longer cache).
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cache, cached_property

import msgspec
import torch

from genie.frontend.names import Owner
from genie.wire.messages import TensorSpec

FORMAT = 3

# No gc: a graph is a tree of numbers, and thousands of tracked objects would each time set off the
# collector, which walks over all of torch.


class Phase(StrEnum):
    UNKNOWN = "unknown"
    PREFILL = "prefill"
    DECODE = "decode"
    TEXT_ENCODE = "text_encode"  # a text whole, with nothing to generate from it
    VISION_ENCODE = "vision_encode"


class Residency(StrEnum):
    UNKNOWN = "unknown"
    PERSISTENT_WEIGHT = "persistent_weight"
    STATEFUL_KV_CACHE = "stateful_kv_cache"
    EPHEMERAL_ACTIVATION = "ephemeral_activation"
    EXTERNAL_INPUT = "external_input"
    EXTERNAL_OUTPUT = "external_output"


class Modality(StrEnum):
    UNKNOWN = "unknown"
    TEXT = "text"
    VISION = "vision"
    MULTIMODAL = "multimodal"


class Origin(StrEnum):
    """Where a value comes from that a program uses but does not make."""

    PARAMETER = "parameter"  # an nn.Parameter
    HOST = "host"  # any other tensor that came from the client's memory
    EARLIER = "earlier"  # kept by an earlier program


class Cost(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """``flops`` is None where no formula is known; ``nbytes`` are read and written, 0 for views.

    ``dims``: the sizes that the op's efficiency depends on, see `genie.srg.cost.dims`; the first scales
    with the batch. ``dtype``: what it computes in.
    """

    flops: int | None
    nbytes: int
    dims: tuple[int, ...] = ()
    dtype: str = "float32"

    @property
    def intensity(self) -> float | None:
        """FLOPs per byte; None without FLOPs or without bytes."""
        return None if self.flops is None or not self.nbytes else self.flops / self.nbytes


class Node(msgspec.Struct, array_like=True, gc=False):
    """One instruction, or one external (``op`` is "genie::external", no inputs, one output).

    ``args``/``kwargs`` are the op's argument patterns (see `OpDef`), filled in order from ``inputs``,
    ``literals`` and ``floats``. A spec is None when only the server can tell it.
    """

    number: int
    op: str
    args: list
    kwargs: dict[str, list]
    inputs: tuple[int, ...]
    literals: tuple[int, ...]
    floats: tuple[float, ...]
    outputs: tuple[int, ...]  # new values
    specs: tuple[TensorSpec | None, ...]  # of ``outputs``
    writes: tuple[int, ...]  # values changed in place
    is_view: bool  # the outputs are views of inputs[0]
    leaves: bool  # an output is read by the client, or outlives the program
    cost: Cost
    origin: Origin | None = None  # externals only
    phase: Phase = Phase.UNKNOWN
    residency: Residency = Residency.UNKNOWN
    modality: Modality = Modality.UNKNOWN
    stage: int | None = None  # convolution stage, counted from 0 within a tower
    module: str | None = None  # "transformer.h.3.mlp", "" at the top; None where no weight has a name
    branch: int | None = None  # see `genie.semantics.branches`
    owners: tuple[Owner, ...] = ()  # externals only: where this weight is in the module tree

    @property
    def name(self) -> str:
        return base_name(self.op)

    @property
    def weight(self) -> str | None:
        """Qualified name of the weight that an external is; of a tied one the first."""
        return self.owners[0].path if self.owners else None


class Edge(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """Node ``target`` reads ``value`` from ``source``.

    ``order``: ``source`` wrote in place to the storage that ``value`` shares, so it must come first.
    That ``target`` must not be moved before an earlier reader follows from program order alone.
    """

    source: int
    target: int
    value: int
    spec: TensorSpec | None
    nbytes: int
    order: bool = False


@dataclass
class Wiring:
    """Lookups derived from a graph's nodes. ``nbytes`` of each value, 0 where its spec is not known;
    ``root`` maps a view to the value that owns its storage; ``by_name`` the instructions, in order, by
    `Node.name`; ``views`` are those that make views."""

    producer: dict[int, Node] = field(default_factory=dict)
    readers: dict[int, list[Node]] = field(default_factory=dict)
    spec: dict[int, TensorSpec | None] = field(default_factory=dict)
    nbytes: dict[int, int] = field(default_factory=dict)
    root: dict[int, int] = field(default_factory=dict)
    by_name: dict[str, list[Node]] = field(default_factory=dict)
    views: list[Node] = field(default_factory=list)


class Graph(msgspec.Struct, dict=True):
    """``digest`` (SHA-256) covers ops, constant arguments, wiring and what leaves; not sizes, literals
    or annotations: one decode step has the digest of the next. Equal in every process."""

    externals: list[Node]
    nodes: list[Node]
    digest: bytes
    blocks: list[tuple[int, int, Phase]] = []  # annotated: instructions [start, stop), innermost last
    notes: list[str] = []  # what a reader should know, as where a hint contradicts the evidence
    format: int = FORMAT

    @cached_property
    def wiring(self) -> Wiring:
        w = Wiring()
        for node in (*self.externals, *self.nodes):
            for value, spec in zip(node.outputs, node.specs, strict=True):
                w.producer[value], w.spec[value], w.readers[value] = node, spec, []
                w.nbytes[value] = nbytes(spec)
                w.root[value] = w.root[node.inputs[0]] if node.is_view else value
            for value in node.inputs:
                w.readers[value].append(node)
        for node in self.nodes:
            w.by_name.setdefault(node.name, []).append(node)
            if node.is_view:
                w.views.append(node)
        return w

    @cached_property
    def edges(self) -> list[Edge]:
        """What each instruction reads, in order of the readers."""
        w, found = self.wiring, list[Edge]()
        writer: dict[int, int] = {}  # root -> the last instruction that wrote to its storage
        for node in self.nodes:
            for v in dict.fromkeys(node.inputs):
                source = w.producer[v].number
                found.append(Edge(source, node.number, v, w.spec[v], w.nbytes[v]))
                last = writer.get(w.root[v])
                if last is not None and last > source:
                    found.append(Edge(last, node.number, v, w.spec[v], w.nbytes[v], True))
            for v in node.writes:
                writer[w.root[v]] = node.number
        return found

    def named(self, names: Collection[str]) -> list[Node]:
        """The instructions with one of these names, in program order."""
        by_name = self.wiring.by_name
        lists = [by_name[name] for name in names if name in by_name]
        if len(lists) == 1:
            return lists[0]
        return sorted((n for found in lists for n in found), key=_number)

    @property
    def flops(self) -> int:
        """Of the nodes whose FLOPs are known."""
        return sum(n.cost.flops or 0 for n in self.nodes)

    @property
    def nbytes(self) -> int:
        """Bytes that the nodes read and write, each from memory."""
        return sum(n.cost.nbytes for n in self.nodes)

    def to_bytes(self) -> bytes:
        return msgspec.msgpack.encode(self)

    @classmethod
    def from_bytes(cls, data: bytes) -> Graph:
        """Raises msgspec.ValidationError (a ValueError) for bytes that are no graph of this format."""
        graph = msgspec.msgpack.decode(data, type=cls)
        if graph.format != FORMAT:
            raise msgspec.ValidationError(
                f"graph of format {graph.format}; this version reads format {FORMAT}: build the graph anew"
            )
        return graph

    def __str__(self) -> str:
        from genie.srg.text import text

        return text(self)


def _number(node: Node) -> int:
    return node.number


@cache
def base_name(op: str) -> str:
    """``add`` for ``aten::add.Tensor``."""
    return op.partition("::")[2].partition(".")[0]


@cache
def itemsize(dtype: str) -> int:
    return getattr(torch, dtype).itemsize


def numel(spec: TensorSpec) -> int:
    n = 1
    for size in spec.shape:
        n *= size
    return n


def nbytes(spec: TensorSpec | None) -> int:
    """Bytes of the elements (not of the storage); 0 when the spec is unknown."""
    return 0 if spec is None else numel(spec) * itemsize(spec.dtype)
