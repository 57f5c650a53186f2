"""The data flow of a window, as the scheduler needs it: who makes, reads and writes what, and which
instructions cannot be parted."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, cached_property

import torch

from genie.srg.cost import COMPUTE
from genie.srg.graph import Graph, Node, Residency
from genie.wire.allowed_ops import PSEUDO_OPS

#: a copy of an instruction that touches more bytes than this is not cheap
CHEAP_BYTES = 4 << 20


class Flow:
    """Of each instruction: ``inputs`` (without repetition), ``outputs``, ``is_view``. ``made``: the
    instruction that makes a value, -1 for an external. ``last_write``: of a value that owns memory
    (`Wiring.root`), the last instruction that writes to it or to a view of it; only what is written has
    one. ``nbytes`` of every value, 0 where its spec is not known. ``weights``: external values.
    """

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        nodes, wiring = graph.nodes, graph.wiring
        self.root, self.spec, self.nbytes = wiring.root, wiring.spec, wiring.nbytes
        given = [n.inputs for n in nodes]
        self.inputs = [v if len(v) < 2 else tuple(dict.fromkeys(v)) for v in given]
        self.outputs = [n.outputs for n in nodes]
        self.is_view = [n.is_view for n in nodes]
        self.made = made = dict.fromkeys([n.outputs[0] for n in graph.externals], -1)
        for number, outputs in enumerate(self.outputs):
            for v in outputs:
                made[v] = number
        self.last_write: dict[int, int] = {}
        ops = [n.op for n in nodes]
        normalisations = {op for op in set(ops) if _statistics(op) is not None}
        for node, op in zip(nodes, ops, strict=True):
            for v in written(node) if op in normalisations else node.writes:
                self.last_write[self.root[v]] = node.number
        self.weights = frozenset(
            n.outputs[0] for n in graph.externals if n.residency is Residency.PERSISTENT_WEIGHT
        )

    @cached_property
    def readers(self) -> dict[int, list[int]]:
        """The instructions that read a value, ascending; values that none reads are absent."""
        found: dict[int, list[int]] = {}
        for number, inputs in enumerate(self.inputs):
            for v in inputs:
                if v in found:
                    found[v].append(number)
                else:
                    found[v] = [number]
        return found

    def ready(self, value: int, before: int) -> int:
        """The instruction after which ``value`` may be sent to where ``before`` reads it; -1: at once. That
        reader may itself be among those that write to it: then it gets what the window began with."""
        last = self.last_write.get(self.root[value], -1)
        return max(self.made[value], last) if last < before else self.made[value]

    @cached_property
    def last_touch(self) -> dict[int, int]:
        """Of a value that owns memory: the last instruction that reads it, or a view of it."""
        root, found = self.root, {v: numbers[-1] for v, numbers in self.readers.items()}
        for number, is_view in enumerate(self.is_view):
            if is_view:
                for v in self.outputs[number]:
                    if v in found:
                        found[root[v]] = max(found[root[v]], found[v])
        return found

    @cached_property
    def random(self) -> frozenset[int]:
        """Instructions that use or change the session's random state."""
        ops = [n.op for n in self.graph.nodes]
        tagged = {op for op in set(ops) if _tagged(op)}
        nodes = self.graph.nodes
        return frozenset([i for i, op in enumerate(ops) if op in tagged and _draws(nodes[i])])

    @cached_property
    def groups(self) -> list[tuple[int, ...]]:
        """Instructions that must run on the same servers, because they write to the same memory or touch it
        before another one writes to it. Only groups of two or more, by their first instruction."""
        leader: dict[int, int] = {}  # of instructions

        def find(i: int) -> int:
            while leader.setdefault(i, i) != i:
                i = leader[i] = leader[leader[i]]
            return i

        if not self.last_write:
            return []
        aliases = {r: [r] for r in self.last_write}
        for number, is_view in enumerate(self.is_view):
            for v in self.outputs[number] if is_view else ():
                if self.root[v] in aliases:
                    aliases[self.root[v]].append(v)
        for r, last in self.last_write.items():
            touched = {self.made[v] for v in aliases[r]}
            touched.update(i for v in aliases[r] for i in self.readers.get(v, ()))
            a = find(last)
            for i in touched:
                if 0 <= i < last:
                    b = find(i)
                    a, b = min(a, b), max(a, b)
                    leader[b] = a
        members: dict[int, list[int]] = {}
        for i in leader:
            members.setdefault(find(i), []).append(i)
        return [tuple(sorted(m)) for _, m in sorted(members.items()) if len(m) > 1]

    @cached_property
    def group_of(self) -> dict[int, tuple[int, ...]]:
        """The group of an instruction that is in one."""
        return {i: group for group in self.groups for i in group}

    @cached_property
    def leaving_views(self) -> list[tuple[int, int]]:
        """Instructions that make a view which outlives the window, and its value."""
        return [(n.number, n.outputs[0]) for n in self.graph.nodes if n.is_view and n.leaves]

    @cached_property
    def preparation(self) -> frozenset[int]:
        """Cheap instructions that depend on no arithmetic: masks, positions, embeddings."""
        found: set[int] = {-1}
        made = self.made
        for number, inputs in enumerate(self.inputs):
            if all(made[v] in found for v in inputs) and self.cheap(self.graph.nodes[number]):
                found.add(number)
        return frozenset(found - {-1})

    @cached_property
    def followers(self) -> list[int]:
        """Views and preparation that may run wherever they are read, the last first."""
        nodes, prepared, held = self.graph.nodes, self.preparation, self.group_of
        found = [
            number
            for number, is_view in enumerate(self.is_view)
            if (is_view or number in prepared) and number not in held
        ]
        return [i for i in reversed(found) if not nodes[i].leaves and not nodes[i].writes]

    @cached_property
    def branches(self) -> list[list[int]]:
        """The instructions of each branch (`Node.branch`), in program order."""
        found: dict[int, list[int]] = {}
        for number, branch in enumerate([n.branch for n in self.graph.nodes]):
            if branch is not None:
                found.setdefault(branch, []).append(number)
        return [found[b] for b in sorted(found)]

    @cached_property
    def is_stream(self) -> bool:
        """All branches are one computation with the same weights, on different inputs."""
        if len(self.branches) < 2:
            return False
        first, *others = self.branches
        weights, nodes, inputs = self.weights, self.graph.nodes, self.inputs
        used = [[v for v in inputs[i] if v in weights] for i in first]
        ops = [nodes[i].op for i in first]
        return any(used) and all(
            len(other) == len(first)
            and [nodes[i].op for i in other] == ops
            and [[v for v in inputs[i] if v in weights] for i in other] == used
            for other in others
        )

    def cheap(self, node: Node) -> bool:
        """May run on several servers, each making its own copy."""
        return (
            node.is_view or (node.name not in COMPUTE and node.cost.nbytes <= CHEAP_BYTES)
        ) and node.number not in self.random


def written(node: Node) -> Sequence[int]:
    """Values that ``node`` writes to: those that its op's outputs name, and the running statistics of a
    normalisation in training, which they do not."""
    at = _statistics(node.op)
    if at is None or len(node.args) <= at[1] or node.args[at[1]] == ["b", False]:
        return node.writes
    present = [p[0] == "t" for p in node.args]
    statistics = [node.inputs[sum(present[:k])] for k in at[0] if present[k]]
    return (*node.writes, *statistics)


@cache
def _statistics(op: str) -> tuple[list[int], int] | None:
    """Positions of the running statistics, and of the flag that says whether they are written to."""
    overload = _overload(op)
    names = [] if overload is None or "norm" not in op else [a.name for a in overload._schema.arguments]
    flags = [names.index(n) for n in ("training", "train", "use_input_stats") if n in names]
    found = [names.index(n) for n in ("running_mean", "running_var") if n in names]
    return (found, flags[0]) if flags and found else None


_NONDETERMINISTIC: dict[str, bool] = {}


def _tagged(op: str) -> bool:
    found = _NONDETERMINISTIC.get(op)
    if found is None:
        found = _NONDETERMINISTIC[op] = op in PSEUDO_OPS or _is_tagged(op)
    return found


def _is_tagged(op: str) -> bool:
    overload = _overload(op)
    return overload is not None and torch.Tag.nondeterministic_seeded in overload.tags


def _overload(op: str) -> torch._ops.OpOverload | None:
    """None for an op that this torch lacks (a graph from elsewhere): a server will refuse it."""
    namespace, _, rest = op.partition("::")
    base, _, overload = rest.partition(".")
    return getattr(getattr(getattr(torch.ops, namespace), base, None), overload or "default", None)


def _draws(node: Node) -> bool:
    """Whether a tagged op really draws: attention and dropout do not with probability 0, nor when they
    are not training."""
    if node.op in PSEUDO_OPS:
        return True
    overload = _overload(node.op)
    assert overload is not None
    floats = iter(node.floats)
    given: dict[str, object] = {}
    names = [a.name for a in overload._schema.arguments]
    for name, pattern in (*zip(names, node.args, strict=False), *node.kwargs.items()):
        kind = pattern[0]
        if kind == "f":
            given[name] = next(floats)
        elif kind == "fl":
            for _ in range(pattern[1]):
                next(floats)
        elif kind == "b":
            given[name] = pattern[1]
    if given.get("train") is False or given.get("training") is False:
        return False
    if "dropout_p" in names:
        return given.get("dropout_p", 0.0) != 0.0
    return not (node.name in _DROPOUTS and given.get("p") == 0.0)


_DROPOUTS = frozenset({"dropout", "dropout_", "native_dropout", "feature_dropout", "alpha_dropout"})
