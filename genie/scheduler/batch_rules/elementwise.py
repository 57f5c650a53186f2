"""Ops that compute each element of the result from the elements at its place, and factories."""

from __future__ import annotations

from genie.scheduler.batch_rules.proof import TRUE, Proof
from genie.srg.graph import Node

#: in every overload, and in their in-place forms
NAMES = frozenset("""
    __and__ __lshift__ __or__ __rshift__ __xor__ _cast_Byte _cast_Char _cast_Double _cast_Float _cast_Half
    _cast_Int _cast_Long _cast_Short _conj _conj_copy _conj_physical _neg_view _neg_view_copy _prelu_kernel
    _to_copy abs absolute acos acosh add addcdiv addcmul alias alias_copy angle arccos arccosh arcsin arcsinh
    arctan arctan2 arctanh asin asinh atan atan2 atanh bitwise_and bitwise_left_shift bitwise_not bitwise_or
    bitwise_right_shift bitwise_xor ceil celu clamp clamp_max clamp_min clip clone complex conj conj_physical
    contiguous copy copysign cos cosh deg2rad detach detach_copy digamma div divide elu empty_like eq erf erfc
    erfinv exp exp2 expm1 fill fix float_power floor floor_divide fmax fmin fmod frac frexp full_like gcd ge
    gelu greater greater_equal gt hardshrink hardsigmoid hardswish hardtanh heaviside hypot i0 igamma igammac
    imag isclose isfinite isinf isnan isneginf isposinf isreal lcm ldexp le leaky_relu lerp less less_equal
    lgamma lift lift_fresh lift_fresh_copy log log10 log1p log2 log_sigmoid logaddexp logaddexp2 logical_and
    logical_not logical_or logical_xor logit lt masked_fill maximum minimum mish mul multiply mvlgamma
    nan_to_num ne neg negative nextafter not_equal ones_like polar polygamma positive pow rad2deg real
    reciprocal relu relu6 remainder resolve_conj resolve_neg round rsqrt rsub selu sgn sigmoid sign signbit
    silu sin sinc sinh softplus softshrink special_entr special_erfcx special_i0e special_i1 special_i1e
    special_log_ndtr special_ndtri special_xlog1py special_zeta sqrt square sub subtract tan tanh threshold
    to true_divide trunc where xlogy zero zeros_like
""".split())  # fmt: skip
#: the number of a row stays what it is
KEEP_COUNTERS = frozenset({"_to_copy", "clone", "contiguous", "detach", "alias", "lift_fresh", "to"})
_INPLACE_DUNDERS = {"__iand__", "__ilshift__", "__ior__", "__irshift__", "__ixor__"}


def elementwise(p: Proof, node: Node) -> None:
    """Broadcasts from the right. In place, the target has all dimensions of the result."""
    inputs = node.inputs
    outputs = node.outputs
    if len(inputs) == 1:
        tags = p.tags(inputs[0])
        if tags:
            for value in outputs:
                p.state[value] = tags
        return
    shape = p.shape
    rank = len(shape[outputs[0]] if outputs else shape[inputs[0]])
    if len(inputs) == 2:
        a, b = inputs
        one, two = p.state.get(a), p.state.get(b)
        if one is None or two is None:  # the common case: the batch, and something that has none
            tagged, known, other = (a, one, b) if two is None else (b, two, a)
            if known is not None and len(known) == 1 and known[0][0] == TRUE:
                dim = known[0][1] - len(shape[tagged])
                s = shape[other]
                if (len(s) < -dim or s[dim] == 1) and (outputs or tagged == a):
                    result = known if len(shape[tagged]) == rank else p.along([(TRUE, dim + rank)])
                    for value in outputs:
                        p.state[value] = result
                    return
        elif (
            len(one) == len(two) == 1
            and one[0][0] == two[0][0] == TRUE
            and one[0][1] - len(shape[a]) == two[0][1] - len(shape[b]) == one[0][1] - rank
        ):
            for value in outputs:
                p.state[value] = one
            return
    tags = p.join(node, [(v, range(rank - len(shape[v]), rank)) for v in inputs], "")
    if outputs:
        for value in outputs:
            p.tag(value, tags, node)
    else:
        _target_keeps(p, node, inputs[0], tags)


def _target_keeps(p: Proof, node: Node, target: int, tags: tuple[tuple[int, int], ...]) -> None:
    """What is written in place must lie along the batch of its target: `join` saw to it, except where the
    target has one element for all rows."""
    own = {dim for _, dim in p.tags(target)}
    for variable, dim in tags:
        if dim not in own:
            p.whole(variable, node, "writes the batch into a value without it")


def is_inplace(name: str) -> bool:
    return (name.endswith("_") and not name.startswith("__")) or name in _INPLACE_DUNDERS


def is_elementwise(name: str) -> bool:
    if name in _INPLACE_DUNDERS or name in NAMES:
        return True
    return name.endswith("_") and not name.startswith("__") and name[:-1] in NAMES | {"copy"}


def dropout(p: Proof, node: Node) -> None:
    """In evaluation it does nothing."""
    if p.flag(node, 2, "train"):
        p.random(node)
    elementwise(p, node)


def loss(position: int):  # type: ignore[no-untyped-def]
    """Elementwise where nothing is reduced (0); the default is the mean (1)."""

    def rule(p: Proof, node: Node) -> None:
        if p.ints(node, position, "reduction") == (0,):
            elementwise(p, node)
        else:
            p.all_whole(node, node.inputs, "reduces over the batch")

    return rule


def factory(position: int):  # type: ignore[no-untyped-def]
    """Equal rows of as many as a literal says: any of its dimensions may turn out to be the batch."""

    def rule(p: Proof, node: Node) -> None:
        slot = p.slot(node, position, "size")
        if slot is None:
            return
        tags = []
        for dim in range(slot.width):
            n = node.literals[slot.literal + dim]
            if n > 0 and n % p.size == 0:
                tags.append((p.candidate(node, slot.literal + dim, n // p.size), dim))
        if tags:
            p.state[node.outputs[0]] = tuple(tags)

    return rule


def arange(p: Proof, node: Node) -> None:
    """``arange(B)``: the number of each row. Parts count their own rows: right only as an index to them."""
    start = 0 if node.op == "aten::arange.default" else 1
    ints = [p.ints(node, k) for k in range(3)]
    if start and (ints[0] != (0,) or ints[2] not in (None, (1,))):
        return
    slot = p.slot(node, start)
    if slot is not None and slot.kind == "i" and node.literals[slot.literal] == p.size:
        value = node.outputs[0]
        if p.shape[value] == [p.size]:
            p.state[value] = ((p.candidate(node, slot.literal, 1), 0),)
            p.counters.add(value)
