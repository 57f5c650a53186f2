"""Which module an instruction is part of: inferred from the weights that it reads, not recorded.

An instruction that reads a weight (itself, or a view or copy of it) is its module's. One that reads none
lies somewhere inside the innermost module that holds both the instruction with weights before it and the
one after it, in program order: the product of queries and keys between ``attn.c_attn`` and ``attn.c_proj``
is told to be ``attn``'s. That is exact but for what a module does after its last weight: a block's
final addition is told to be the list of blocks'. "" is the module at the top; where weights of several such
modules meet, paths begin with the class of theirs, and what lies between them belongs to None.

A tied weight is in several modules: a lookup is the nn.Embedding's, and where that leaves a choice, it is
the one nearest to the next instruction with a weight of one place.
"""

from __future__ import annotations

from genie.frontend.names import Owner
from genie.srg.graph import Graph, Node

#: their results are still the weight
_COPIES = frozenset({"_to_copy", "clone", "contiguous"})


def recognize(graph: Graph) -> None:
    owners = {e.outputs[0]: e.owners for e in graph.externals if e.owners}
    if not owners:
        return
    several = has_several_roots(graph)
    for external in graph.externals:
        if external.owners:
            external.module = module_path(external.owners[0], several)
    named = _named(graph, owners, several)
    for at in reversed(range(len(named))):
        node, places = named[at]
        if len(places) == 1:
            node.module = places[0]
        else:
            near = named[at + 1][0].module if at + 1 < len(named) else None
            node.module = max(places, key=lambda p: len(_common(p, near or "")))
    _enclose(graph, [node for node, _ in named], several)


def has_several_roots(graph: Graph) -> bool:
    return len({o.root for e in graph.externals for o in e.owners}) > 1


def module_path(owner: Owner, several: bool) -> str:
    return f"{owner.root}.{owner.module}".rstrip(".") if several else owner.module


def _named(
    graph: Graph, owners: dict[int, tuple[Owner, ...]], several: bool
) -> list[tuple[Node, tuple[str, ...]]]:
    """The instructions that read a weight, with the modules it is in."""
    named: list[tuple[Node, tuple[str, ...]]] = []
    places: dict[tuple[tuple[Owner, ...], bool], tuple[str, ...]] = {}
    for node in graph.nodes:
        for value in node.inputs:
            found = owners.get(value)
            if found is not None:
                break
        else:
            continue
        lookup = node.name == "embedding"
        if len(found) == 1:
            modules: tuple[str, ...] = (module_path(found[0], several),)
        else:
            known = places.get((found, lookup))
            if known is None:
                fitting = [o for o in found if o.lookup is lookup] or list(found)
                known = tuple(dict.fromkeys(module_path(o, several) for o in fitting))
                places[found, lookup] = known
            modules = known
        named.append((node, modules))
        if node.is_view or node.name in _COPIES:
            owners.update(dict.fromkeys(node.outputs, found))
    return named


def _enclose(graph: Graph, named: list[Node], several: bool) -> None:
    outside = None if several else ""
    known: dict[tuple[str | None, str | None], str | None] = {}
    before: str | None = None
    start = 0
    for node in (*named, None):
        after = None if node is None else node.module
        between = known.get((before, after), "?")
        if between == "?":
            shared = "" if before is None or after is None else _common(before, after)
            between = known[before, after] = shared or outside
        stop = len(graph.nodes) if node is None else node.number
        for inner in graph.nodes[start:stop]:
            inner.module = between
        start, before = stop + 1, after


def _common(a: str, b: str) -> str:
    """The innermost module that holds both."""
    path, other = a.split("."), b.split(".")
    same = 0
    for part, its in zip(path, other, strict=False):
        if part != its:
            break
        same += 1
    return ".".join(path[:same])
