"""Reductions, and ops that work along one dimension (softmax, cumsum, sort)."""

from __future__ import annotations

from collections.abc import Callable

from genie.scheduler.batch_rules.elementwise import elementwise
from genie.scheduler.batch_rules.proof import TRUE, Proof
from genie.scheduler.batch_rules.shape import follow
from genie.srg.graph import Node

Rule = Callable[[Proof, Node], None]


def reduction(position: int) -> Rule:
    """``position`` of the reduced dimensions; without any all are reduced."""

    def rule(p: Proof, node: Node) -> None:
        if node.op.endswith(".other"):  # max and min of two tensors
            elementwise(p, node)
            return
        value = node.inputs[0]
        rank = len(p.shape[value])
        if not rank:
            return
        dims = p.ints(node, position, "dim") or p.ints(node, position, "axis") or ()
        gone = {d % rank for d in dims} or set(range(rank))
        if len(gone) == rank and any(t == TRUE for t, _ in p.tags(value)):
            for output in node.outputs:
                if p.shape[output]:
                    p.all_whole(node, (value,), "reduces over the batch")
                p.mixed[output] = f"instruction {node.number} {node.op} reduces over the batch"
        else:
            kept = len(p.shape[node.outputs[0]]) == rank  # overloads have the flag at different positions
            follow(
                p, node,
                lambda d: -1 if d in gone else d if kept else d - sum(g < d for g in gone),
                "reduces over the batch",
            )  # fmt: skip

    return rule


def along(position: int, default: int = -1, why: str = "works along the batch", name: str = "dim") -> Rule:
    """One dimension is needed whole; all outputs have the input's dimensions."""

    def rule(p: Proof, node: Node) -> None:
        found = p.ints(node, position, name)
        rank = len(p.shape[node.inputs[0]])
        if rank:
            dim = (found[0] if found else default) % rank
            follow(p, node, lambda d: -1 if d == dim else d, why)

    return rule


#: base name -> rule
RULES: dict[str, Rule] = {
    **{
        name: reduction(1)
        for name in (
            "sum", "mean", "nansum", "nanmean", "prod", "amax", "amin", "argmax", "argmin", "max", "min",
            "any", "all", "median", "nanmedian", "mode", "logsumexp", "std", "var", "std_mean", "var_mean",
            "special_logsumexp",
        )
    },
    "count_nonzero": reduction(1),
    "aminmax": reduction(-1),
    "norm": reduction(2),
    "linalg_vector_norm": reduction(2),
    "kthvalue": reduction(2),
    **{name: along(1, why="normalises over the batch") for name in (
        "softmax", "_softmax", "log_softmax", "_log_softmax", "_safe_softmax", "special_softmax",
        "special_log_softmax", "glu",
    )},
    **{name: along(1, why="accumulates along the batch") for name in (
        "cumsum", "cumprod", "logcumsumexp", "cummax", "cummin",
    )},
    "sort": along(1, why="sorts the batch"),
    "argsort": along(1, why="sorts the batch"),
    "msort": along(9, 0, why="sorts the batch"),
    "topk": along(2, why="selects among the batch"),
}  # fmt: skip
