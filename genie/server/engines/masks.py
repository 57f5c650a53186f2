"""What differs from step to step beside the caches: attention masks made from sizes that grow.

Where it reaches nothing but the masks of growing attention, those instructions are taken out: they run as
they were recorded, before the rest, and the rest takes the masks.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from genie.server.engine import Template
from genie.server.engines.kv import attends
from genie.server.engines.rewrite import facts
from genie.server.engines.specialize import NotSpecializableError, Spec, TooAlikeError

#: instructions that may be run beside a graph
MOST_INSTRUCTIONS = 64


@dataclass(frozen=True)
class Masks:
    """``run`` takes (externals, ints, floats) and returns the masks, (batch or 1, heads or 1, 1, positions).
    ``specs``: of each, with the dtype of the queries that it is for."""

    run: Any
    specs: tuple[tuple[Spec, torch.dtype], ...]


def take_out_masks(
    graph: fx.Graph, template: Template, literals: Collection[int], externals: Collection[int]
) -> Masks | None:
    """Makes of every mask that depends on the given ints and externals (numbers) a placeholder ``mask0``,
    ``mask1``... behind the others. None where nothing depends on them.

    Raises NotSpecializableError where something else than masks depends on them, or where a mask does not
    although the caches under it grow.
    """
    placeholders = [n for n in graph.nodes if n.op == "placeholder"]
    varying: set[fx.Node] = {placeholders[i] for i in externals}
    for node in graph.nodes:
        if node.op == "call_function" and (
            any(i in literals for i in node.meta.get("literals", ()))
            or any(n in varying for n in node.all_input_nodes)
        ):
            if attends(node) and not any(n in varying for n in node.all_input_nodes[:3]):
                continue  # its mask varies, what it makes has the same shape
            varying.add(node)
    ends: list[fx.Node] = []
    for node in graph.nodes:
        if node not in varying:
            continue
        for user in node.users:
            if user in varying:
                continue
            states: Any = user.args[1:3]
            grows = attends(user) and all(k.target is torch.ops.aten.cat.default for k in states)
            if not grows or _mask(user) is not node:
                raise NotSpecializableError(f"{user.target} depends on sizes that differ from run to run")
            if node not in ends:
                ends.append(node)
    for node in graph.nodes:
        if attends(node) and _mask(node) is not None and _mask(node) not in varying:
            key: Any = node.args[1]
            if key.target is torch.ops.aten.cat.default and key.args[0][0].op == "placeholder":
                raise TooAlikeError("it ran with caches of one length only, and masks for that")
    if not ends:
        if varying - set(placeholders):
            raise NotSpecializableError("what depends on sizes that differ from run to run is kept")
        return None
    specs = []
    for node in ends:
        spec = node.meta["spec"]
        heads = {u.args[0].meta["spec"].shape[1] for u in node.users}  # type: ignore[union-attr]
        if len(spec.shape) != 4 or spec.shape[2] != 1 or {spec.shape[1]} not in ({1}, heads):
            raise NotSpecializableError(f"a mask of shape {spec.shape} is no row for each query")
        specs.append((spec, next(iter(node.users)).args[0].meta["spec"].dtype))  # type: ignore[union-attr]
    needed = _ancestors(ends)
    if facts.storages(needed | varying) & facts.written_storages(graph):
        raise NotSpecializableError("a mask is written to in place")
    instructions = sorted({n.meta["instruction"] for n in needed if n.op == "call_function"})
    if len(instructions) > MOST_INSTRUCTIONS:
        raise NotSpecializableError(f"its masks take {len(instructions)} instructions")
    run = template.part(instructions, [n.meta["slot"] for n in ends])
    last = placeholders[-1]
    for k, node in enumerate(ends):
        with graph.inserting_after(last):
            last = graph.placeholder(f"mask{k}")
        last.meta["spec"] = node.meta["spec"]
        node.replace_all_uses_with(last)
    for node in reversed(list(graph.nodes)):
        if node in varying and node.op == "call_function":
            graph.erase_node(node)
    return Masks(run, tuple(specs))


def _ancestors(nodes: list[fx.Node]) -> set[fx.Node]:
    found, todo = set(nodes), list(nodes)
    while todo:
        for node in todo.pop().all_input_nodes:
            if node not in found:
                found.add(node)
                todo.append(node)
    return found


def _mask(node: fx.Node) -> Any:
    return node.args[3] if len(node.args) > 3 else node.kwargs.get("attn_mask")


def fill(buffer: Tensor, mask: Tensor) -> None:
    """Writes a mask, boolean or to be added, into the front of an additive one; nothing behind it is seen."""
    buffer.fill_(float("-inf"))
    front = buffer.narrow(3, 0, mask.shape[3])
    if mask.dtype is torch.bool:
        front.masked_fill_(mask, 0.0)
    else:
        front.copy_(mask)
