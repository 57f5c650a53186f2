"""Matrix products, attention, convolutions, normalisation, pooling: which dimensions they treat alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from genie.scheduler.batch_rules.proof import Proof
from genie.scheduler.batch_rules.shape import follow
from genie.srg.graph import Node

Rule = Callable[[Proof, Node], None]
_SUMS = "sums over the batch"


def _right(rank: int, of: int, last: Sequence[int] = ()) -> list[int]:
    """Labels of ``rank`` dimensions aligned with the right end of ``of``; ``last`` replaces the last."""
    labels = list(range(of - rank, of))
    if last:
        labels[rank - len(last) :] = last
    return labels


def linear(p: Proof, node: Node) -> None:
    x, out = node.inputs[0], node.outputs[0]
    tags = p.tags(x)
    state = p.state
    rank = len(p.shape[x])
    if not any(v in state for v in node.inputs[1:]):
        for variable, dim in tags:
            if dim == rank - 1:
                p.whole(variable, node, _SUMS)
        p.tag(out, p.tags(x), node)
        return
    last = len(p.shape[out]) - 1
    w = [last, -1] if len(p.shape[node.inputs[1]]) == 2 else [-1]
    operands = [(x, [*range(rank - 1), -1]), (node.inputs[1], w)]
    operands += [(b, [last] if p.shape[b] else []) for b in node.inputs[2:]]
    p.tag(out, p.join(node, operands, _SUMS), node)


def _rank(p: Proof, node: Node) -> int:
    return len(p.shape[node.outputs[0] if node.outputs else node.inputs[0]])


def _product(p: Proof, node: Node, a: int, b: int) -> list[tuple[int, list[int]]]:
    """Operands of ``a @ b``, or of what it is added to in place."""
    ra, rb, rank = len(p.shape[a]), len(p.shape[b]), _rank(p, node)
    if ra == 1 or rb == 1:
        rest = (ra > 1) + (rb > 1)  # of the result's dimensions, how many are no batch of matrices
        first = [-1] if ra == 1 else [*_right(ra - 2, rank - rest), rank - 1, -1]
        second = [-1] if rb == 1 else [*_right(rb - 2, rank - rest), -1, rank - 1]
        return [(a, first), (b, second)]
    return [(a, _right(ra, rank, (rank - 2, -1))), (b, _right(rb, rank, (-1, rank - 1)))]


def matmul(p: Proof, node: Node) -> None:
    a, b = node.inputs[:2]
    p.tag(node.outputs[0], p.join(node, _product(p, node, a, b), _SUMS), node)


def added_product(p: Proof, node: Node) -> None:
    """addmm, baddbmm, addmv: the first operand broadcasts to the product, or is the target of the sum."""
    bias, a, b = node.inputs[:3]
    rank = _rank(p, node)
    operands = [(bias, _right(len(p.shape[bias]), rank)), *_product(p, node, a, b)]
    tags = p.join(node, operands, _SUMS)
    for output in node.outputs:
        p.tag(output, tags, node)


def outer(p: Proof, node: Node) -> None:
    a, b = node.inputs
    p.tag(node.outputs[0], p.join(node, [(a, [0]), (b, [1])], ""), node)


def attention(p: Proof, node: Node) -> None:
    """softmax(q k' + mask) v over (..., heads, queries, width). Heads that share keys are needed whole."""
    dropout = p.slot(node, 4, "dropout_p")
    if node.op.startswith("aten::_scaled_dot_product_flash"):  # (q, k, v, dropout_p, is_causal, *, attn_mask)
        dropout = p.slot(node, 3, "dropout_p")
    if dropout is not None and dropout.kind == "f" and node.floats[dropout.float] != 0.0:
        p.random(node)
    q, k, v = node.inputs[:3]
    rank = len(p.shape[q])
    lead = list(range(rank - 2))
    if rank >= 4 and not p.shape[q][-3] == p.shape[k][-3] == p.shape[v][-3]:
        lead[-1] = -1
    rest = [-1, -1]
    operands = [(q, lead + rest), (k, lead + rest), (v, lead + rest)]
    for mask in node.inputs[3:]:
        shape = p.shape[mask]
        if len(shape) > rank:
            p.all_whole(node, node.inputs, "has a mask of more dimensions than queries")
            return
        operands.append((mask, (lead + rest)[rank - len(shape) :]))
    tags = p.join(node, operands, "attends along the batch")
    for output in node.outputs[:2]:  # what follows (seeds) does not depend on the inputs
        p.tag(output, tags, node)


def heads(p: Proof, node: Node) -> None:
    """The fused layer of `nn.MultiheadAttention` over (batch, length, width), without a mask."""
    if p.slot(node, 9, "mask") is not None:
        p.all_whole(node, node.inputs, "attends under a mask of many forms, which has no rule")
        return
    operands = [(v, [0, -1, -1]) for v in node.inputs[:3]]
    operands += [(v, [-1] * len(p.shape[v])) for v in node.inputs[3:]]
    tags = p.join(node, operands, "attends along the batch")
    for output in node.outputs:
        p.tag(output, tags, node)


def convolution(p: Proof, node: Node) -> None:
    x, w = node.inputs[:2]
    batched = len(p.shape[x]) == len(p.shape[w])
    operands = [(x, [0 if batched and not d else -1 for d in range(len(p.shape[x]))])]
    operands += [(v, [-1] * len(p.shape[v])) for v in node.inputs[1:]]
    p.tag(node.outputs[0], p.join(node, operands, "convolves along the batch"), node)


def batch_norm(training: int) -> Rule:
    """In evaluation each element is scaled by its channel. ``training``: position of the flag, -1: never."""

    def rule(p: Proof, node: Node) -> None:
        means, variances = p.values(node, 3, "running_mean"), p.values(node, 4, "running_var")
        why = "scales channels"
        labels = [-1 if d == 1 else d for d in range(len(p.shape[node.inputs[0]]))]
        if (training >= 0 and p.flag(node, training, "training")) or not means or not variances:
            why = "takes its statistics over the batch: call model.eval() first"
            labels = [-1] * len(labels)
        operands = [(node.inputs[0], labels)]
        operands += [(v, [-1] * len(p.shape[v])) for v in node.inputs[1:]]
        p.tag(node.outputs[0], p.join(node, operands, why), node)

    return rule


def layer_norm(p: Proof, node: Node) -> None:
    """Also rms_norm and native_layer_norm, whose statistics have the leading dimensions."""
    x, shape = node.inputs[0], p.ints(node, 1, "normalized_shape") or ()
    kept = len(p.shape[x]) - len(shape)
    for v in node.inputs[1:]:
        if v in p.state:
            p.all_whole(node, (v,), "scales by the batch")
    follow(p, node, lambda d: d if d < kept else -1, "normalises over the batch")


def group_norm(p: Proof, node: Node) -> None:
    """Also native_group_norm, which has the batch's size as a literal."""
    for v in node.inputs[1:]:
        p.all_whole(node, (v,), "scales by the batch")
    slot = p.slot(node, 3) if node.name == "native_group_norm" else None
    x = node.inputs[0]
    follow(p, node, lambda d: -1 if d else 0, "normalises over the batch")
    if slot is not None:
        for variable, _ in p.tags(x):
            p.scaled.append((variable, node.number, slot.literal, p.shape[x][0] // p.size))


def planes(spatial: int) -> Rule:
    """Pooling, resampling, shuffling of pixels: over the last dimensions of each plane."""

    def rule(p: Proof, node: Node) -> None:
        first = len(p.shape[node.inputs[0]]) - spatial
        follow(p, node, lambda d: d if d < first else -1, "works along the batch")

    return rule


def _pooling() -> dict[str, Rule]:
    found: dict[str, Rule] = {}
    for n in (1, 2, 3):
        rule = planes(n)
        for name in (
            f"max_pool{n}d", f"avg_pool{n}d", f"adaptive_avg_pool{n}d", f"adaptive_max_pool{n}d",
            f"max_pool{n}d_with_indices", f"_adaptive_avg_pool{n}d", f"upsample_nearest{n}d",
            f"_upsample_nearest_exact{n}d",
        ):  # fmt: skip
            found[name] = rule
    two = planes(2)
    for name in (
        "upsample_bilinear2d", "upsample_bicubic2d", "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa",
    ):  # fmt: skip
        found[name] = two
    return found | {"upsample_linear1d": planes(1), "upsample_trilinear3d": planes(3),
                    "pixel_shuffle": planes(3), "pixel_unshuffle": planes(3)}  # fmt: skip


RULES: dict[str, Rule] = {
    "linear": linear,
    "_native_multi_head_attention": heads,
    **dict.fromkeys(("matmul", "mm", "bmm", "mv", "linalg_matmul", "dot"), matmul),
    **dict.fromkeys(("addmm", "baddbmm", "addmv"), added_product),
    **dict.fromkeys(("outer", "ger"), outer),
    **dict.fromkeys(
        ("conv1d", "conv2d", "conv3d", "convolution", "_convolution", "conv_transpose1d", "conv_transpose2d",
         "conv_transpose3d", "_slow_conv2d_forward", "_conv_depthwise2d", "conv_depthwise3d"), convolution,
    ),
    "batch_norm": batch_norm(5),
    "native_batch_norm": batch_norm(5),
    "_native_batch_norm_legit_no_training": batch_norm(-1),
    **dict.fromkeys(("layer_norm", "native_layer_norm", "rms_norm", "_fused_rms_norm"), layer_norm),
    **dict.fromkeys(("group_norm", "native_group_norm"), group_norm),
    **_pooling(),
}  # fmt: skip
#: these draw random numbers if told to, whatever their inputs are
ATTENTION = (
    "scaled_dot_product_attention", "_scaled_dot_product_flash_attention_for_cpu",
)  # fmt: skip
