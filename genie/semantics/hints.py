"""What `genie.annotate_phase` says, over what all others have found: a contradiction is noted."""

from __future__ import annotations

from collections import Counter

from genie.semantics.modules import has_several_roots
from genie.srg.graph import Graph, Phase


def recognize(graph: Graph) -> None:
    """Of annotated blocks the innermost, else of annotated modules the innermost."""
    modules = _annotated_modules(graph)
    if not (modules or graph.blocks):
        return
    contradicted: Counter[tuple[str, Phase, Phase]] = Counter()

    said: list[tuple[str, Phase] | None]
    by_module = {m: _innermost(modules, m) for m in {n.module for n in graph.nodes}}
    said = [by_module[n.module] for n in graph.nodes]
    for start, stop, phase in graph.blocks:
        said[start:stop] = [("a block", phase)] * (stop - start)
    for node, hint in zip(graph.nodes, said, strict=True):
        if hint is not None:
            if node.phase is not Phase.UNKNOWN and node.phase is not hint[1]:
                contradicted[(*hint, node.phase)] += 1
            node.phase = hint[1]
    for (where, phase, evidence), count in contradicted.items():
        graph.notes.append(
            f"annotate_phase says {phase.value} of {where}, though {count} ops there are "
            f"{evidence.value} by evidence: the annotation wins"
        )


def _annotated_modules(graph: Graph) -> dict[str, Phase]:
    several = has_several_roots(graph)
    found: dict[str, Phase] = {}
    for external in graph.externals:
        for owner in external.owners:
            if owner.hint is not None:
                path, phase = owner.hint
                found[f"{owner.root}.{path}".rstrip(".") if several else path] = Phase(phase)
    return found


def _innermost(annotated: dict[str, Phase], module: str | None) -> tuple[str, Phase] | None:
    if module is None:
        return None
    at = module
    while at and at not in annotated:
        at = at.rpartition(".")[0]
    return (at or "the module at the top", annotated[at]) if at in annotated else None
