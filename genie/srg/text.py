"""A graph as text that a person can read: one line per external and per instruction."""

from __future__ import annotations

from collections.abc import Iterator

from genie.srg.graph import Cost, Graph, Node
from genie.wire.messages import TensorSpec

_SHORT = {"float": "f", "bfloat": "bf", "int": "i", "uint": "u", "complex": "c"}


def text(graph: Graph) -> str:
    head = (
        f"graph {graph.digest.hex()[:12]}: {len(graph.nodes)} ops, {len(graph.externals)} externals, "
        f"{_si(graph.flops)}FLOP, {_si(graph.nbytes)}B"
    )
    lines = [head]
    for n in graph.externals:
        lines.append(f"  {_value(n.outputs[0])}: {_spec(n.specs[0])} = {n.origin}{_notes(n)}")
    for n in graph.nodes:
        made = ", ".join(f"{_value(v)}: {_spec(s)}" for v, s in zip(n.outputs, n.specs, strict=True))
        lines.append(f"  {made + ' = ' if made else ''}{n.name}({_arguments(n)}){_notes(n)}")
    return "\n".join(lines)


def _notes(node: Node) -> str:
    found = [x.value for x in (node.phase, node.residency, node.modality) if x.value != "unknown"]
    if node.stage is not None:
        found.append(f"stage {node.stage}")
    if node.module is not None:
        found.append(node.module)
    if node.origin is None:
        found.append(_cost(node.cost))
    return "  # " + " ".join(filter(None, found)) if any(found) else ""


def _cost(cost: Cost) -> str:
    if cost.intensity is not None:
        return f"{_si(cost.flops or 0)}FLOP {_si(cost.nbytes)}B ({cost.intensity:.3g} FLOP/B)"
    return f"{_si(cost.nbytes)}B" if cost.nbytes else ""


def _arguments(node: Node) -> str:
    values, ints, floats = iter(node.inputs), iter(node.literals), iter(node.floats)

    def show(pattern: list) -> str:
        kind = pattern[0]
        if kind == "t":
            return _value(next(values))
        if kind == "i":
            return str(next(ints))
        if kind == "f":
            return repr(next(floats))
        if kind == "tl":
            return _listed(_value(next(values)) for _ in range(pattern[1]))
        if kind == "ol":
            return _listed(_value(next(values)) if present else "None" for present in pattern[1])
        if kind == "il":
            return _listed(str(next(ints)) for _ in range(pattern[1]))
        if kind == "fl":
            return _listed(repr(next(floats)) for _ in range(pattern[1]))
        if kind in ("n", "dev"):
            return "None" if kind == "n" else "device"
        return str(complex(*pattern[1:])) if kind == "c" else str(pattern[1])

    parts = [show(p) for p in node.args]
    parts += [f"{key}={show(p)}" for key, p in node.kwargs.items()]
    return ", ".join(parts)


def _listed(items: Iterator[str]) -> str:
    return "[" + ", ".join(items) + "]"


def _value(value: int) -> str:
    return f"%{value}" if value >= 0 else f"e{-value - 1}"


def _spec(spec: TensorSpec | None) -> str:
    if spec is None:
        return "?"
    stem = spec.dtype.rstrip("0123456789")
    return _SHORT.get(stem, stem) + spec.dtype[len(stem) :] + "[" + ", ".join(map(str, spec.shape)) + "]"


def _si(n: float) -> str:
    """Decimal prefixes: 1500 is "1.5 k"."""
    for prefix in ("", "k", "M", "G"):
        if n < 1000:
            return f"{n:.3g} {prefix}"
        n /= 1000
    return f"{n:.3g} T"
