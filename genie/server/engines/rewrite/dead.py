"""Removes calls whose results nobody reads.

A call that writes stays if what it writes to is read later, outlives the program, or came from outside. So do
calls that draw random numbers, and those that are there for something other than their result.
"""

from __future__ import annotations

import torch
from torch import fx

from genie.server.engines.rewrite.facts import is_pure, kept, overload, storages, written


def dead(graph: fx.Graph) -> int:
    changed = 0
    read = storages([*kept(graph), *(n for n in graph.nodes if n.op == "placeholder")])
    for node in reversed(list(graph.nodes)):
        if node.op != "call_function":
            continue
        if not node.users and not _has_effect(node, read):
            graph.erase_node(node)
            changed += 1
        else:
            read |= storages([node, *node.all_input_nodes])
    return changed


def _has_effect(node: fx.Node, read: set[int]) -> bool:
    targets = written(node)
    if not targets:
        return not is_pure(node)
    op = overload(node)
    assert op is not None
    if op.namespace != "aten" or torch.Tag.nondeterministic_seeded in op.tags:
        return True
    # A value without a spec is one whose memory is not known.
    return any("spec" not in v.meta for v in targets) or bool(storages(targets) & read)
