"""A graph as text that a person can read: by module, then one line per external and per instruction."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterator
from functools import cache

from genie.srg.critical import NOMINAL, critical_path
from genie.srg.graph import Cost, Graph, Node
from genie.wire.messages import TensorSpec

_SHORT = {"float": "f", "bfloat": "bf", "int": "i", "uint": "u", "complex": "c"}
#: depth of a summary's lines; "3" in "transformer.h.3.mlp": a module's place in a list
_LEVELS = 2
_INDEX = re.compile(r"(?<=\.)\d+(?=\.|$)|^\d+(?=\.|$)")


def text(graph: Graph) -> str:
    """Instructions on the critical path, at nominal rates, are marked with ``*``."""
    path, length = critical_path(graph, NOMINAL.seconds(graph.nodes))
    critical = set(path)
    lines = [
        f"graph {graph.digest.hex()[:12]}: {len(graph.nodes)} ops, {len(graph.externals)} externals, "
        f"{_si(graph.flops)}FLOP, {_si(graph.nbytes)}B; critical path (*) {len(path)} ops, {_si(length)}s at "
        f"{_si(NOMINAL.flops_per_s)}FLOP/s, {_si(NOMINAL.bytes_per_s)}B/s"
    ]
    lines += [f"note: {note}" for note in graph.notes]
    lines += _summary(graph, critical)
    lines.append("externals:")
    for n in graph.externals:
        lines.append(f"  {_value(n.outputs[0])}: {_spec(n.specs[0])} = {n.origin}{_notes(n)}")
    lines.append("ops:")
    for n in graph.nodes:
        made = ", ".join(f"{_value(v)}: {_spec(s)}" for v, s in zip(n.outputs, n.specs, strict=True))
        mark = "*" if n.number in critical else " "
        lines.append(f"{mark} {made + ' = ' if made else ''}{n.name}({_arguments(n)}){_notes(n)}")
    return "\n".join(lines)


def _summary(graph: Graph, critical: Collection[int]) -> Iterator[str]:
    """One line per module, in program order: of a list each element, of others two levels. Equal elements
    are folded into "x12 transformer.h.*"."""
    named = [n for n in graph.nodes if n.module is not None]
    if not named:
        return
    parts: dict[str, list[Node]] = {}
    for node in named:
        parts.setdefault(_part(node.module or ""), []).append(node)
    folded: dict[tuple, list[str]] = {}
    for module, nodes in parts.items():
        what = tuple(n.op for n in nodes)
        folded.setdefault((_INDEX.sub("*", module), what), []).append(module)
    yield "modules:"
    for (pattern, _), modules in folded.items():
        nodes = [n for module in modules for n in parts[module]]
        title = f"x{len(modules)} {pattern}" if len(modules) > 1 else modules[0] or "(the module at the top)"
        flops, moved = sum(n.cost.flops or 0 for n in nodes), sum(n.cost.nbytes for n in nodes)
        marked = sum(n.number in critical for n in nodes)
        found = [_most(n.phase.value for n in nodes), _most(n.modality.value for n in nodes)]
        branches = sorted({n.branch for n in nodes if n.branch is not None})
        if branches:
            found.append("branch " + ", ".join(map(str, branches)))
        note = "  # " + " ".join(filter(None, found)) if any(found) else ""
        yield (
            f"  {title}: {len(nodes) // len(modules)} ops{' each' if len(modules) > 1 else ''}, "
            f"{_si(flops)}FLOP, {_si(moved)}B, {marked} critical{note}"
        )


@cache
def _part(module: str) -> str:
    path = module.split(".")
    at = next((k for k, name in enumerate(path) if name.isdigit()), _LEVELS - 1)
    return ".".join(path[: at + 1])


def _most(names: Iterator[str]) -> str:
    """The commonest name that is not "unknown"."""
    found = Counter(name for name in names if name != "unknown").most_common(1)
    return found[0][0] if found else ""


def _notes(node: Node) -> str:
    found = [x.value for x in (node.phase, node.residency, node.modality) if x.value != "unknown"]
    if node.stage is not None:
        found.append(f"stage {node.stage}")
    if node.branch is not None:
        found.append(f"branch {node.branch}")
    if node.weight is not None or node.module:
        found.append(node.weight or node.module or "")
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
    """Decimal prefixes: 1500 is "1.5 k", 0.002 is "2 m"."""
    if 0 < n < 1:
        for prefix in ("m", "u"):
            n *= 1000
            if n >= 1:
                return f"{n:.3g} {prefix}"
        return f"{n * 1000:.3g} n"
    for prefix in ("", "k", "M", "G"):
        if n < 1000:
            return f"{n:.3g} {prefix}"
        n /= 1000
    return f"{n:.3g} T"
