"""One rule per family of ops: where the batch lies in the results (see `genie.scheduler.batch_axis`)."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

from genie.scheduler.batch_rules import elementwise as each
from genie.scheduler.batch_rules import index, product, reduce, shape
from genie.scheduler.batch_rules.proof import Proof
from genie.srg.graph import Node, base_name


class Rule(NamedTuple):
    """``apply``: None where there is no rule. ``always``: it also applies where no input has the batch.
    ``keeps_counters``: see `Proof`. ``never``: why no graph with this op can be split, whatever it reads."""

    apply: Callable[[Proof, Node], None] | None
    always: bool = False
    keeps_counters: bool = False
    never: str = ""


#: draw from the random state, or change it
RANDOM = frozenset(
    """
    _fused_dropout _sample_dirichlet _standard_gamma alpha_dropout bernoulli binomial cauchy exponential
    feature_alpha_dropout feature_dropout fractional_max_pool2d fractional_max_pool3d geometric get_rng_state
    gru log_normal lstm manual_seed multinomial native_dropout normal normal_functional poisson rand rand_like
    randint randint_like randn randn_like random randperm rnn_relu rnn_tanh rrelu rrelu_with_noise
    rrelu_with_noise_functional set_rng_state uniform _cudnn_rnn _philox_normal _philox_uniform
    _scaled_dot_product_attention_math _scaled_dot_product_cudnn_attention
    _scaled_dot_product_cudnn_attention_backward _scaled_dot_product_efficient_attention
    _scaled_dot_product_efficient_attention_backward _scaled_dot_product_flash_attention
    _scaled_dot_product_fused_attention_overrideable
""".split()
)
#: change the shape of a value that the graph knows by its first one
RESHAPES_IN_PLACE = frozenset(
    ("as_strided_", "squeeze_", "swapaxes_", "swapdims_", "t_", "transpose_", "unsqueeze_", "set_", "resize_")
)

_STRUCTURAL = {
    **dict.fromkeys(("view", "_unsafe_view", "reshape", "_reshape_copy", "view_copy"), shape.view),
    **dict.fromkeys(("unsqueeze", "unsqueeze_copy"), shape.unsqueeze),
}
_CREATING = {
    **dict.fromkeys(("expand", "expand_copy", "broadcast_to"), shape.expand),
    "repeat": shape.repeat,
    "repeat_interleave": shape.repeat_interleave,
    **dict.fromkeys(("zeros", "ones", "full", "empty"), each.factory(0)),
    **dict.fromkeys(("new_zeros", "new_ones", "new_full", "new_empty"), each.factory(1)),
    "arange": each.arange,
    "dropout": each.dropout,
    **dict.fromkeys(product.ATTENTION, product.attention),
}
_ORDINARY = {
    **dict.fromkeys(("permute", "permute_copy"), shape.permute),
    **dict.fromkeys(("transpose", "transpose_copy", "swapaxes", "swapdims"), shape.transpose),
    **dict.fromkeys(("t", "t_copy", "numpy_T"), shape.t),
    "mT": shape.m_t,
    **dict.fromkeys(("squeeze", "squeeze_copy"), shape.squeeze),
    **dict.fromkeys(("select", "select_copy"), shape.select),
    **dict.fromkeys(("slice", "slice_copy"), shape.slice_),
    **dict.fromkeys(("narrow", "narrow_copy"), shape.cut(1)),
    **dict.fromkeys(
        ("split", "split_copy", "split_with_sizes", "split_with_sizes_copy", "chunk", "tensor_split",
         "unsafe_split", "unsafe_chunk", "unsafe_split_with_sizes"), shape.cut(2, why="splits the batch"),
    ),
    **dict.fromkeys(("unbind", "unbind_copy"), shape.unbind),
    **dict.fromkeys(("diagonal", "diagonal_copy"), shape.diagonal),
    **dict.fromkeys(("unfold", "unfold_copy"), shape.unfold),
    "flip": shape.flip,
    "roll": shape.roll,
    "constant_pad_nd": shape.pad,
    **{f"{kind}_pad{n}d": shape.reflect for kind in ("reflection", "replication") for n in (1, 2, 3)},
    **dict.fromkeys(("tril", "triu"), shape.triangle),
    **dict.fromkeys(("cat", "concat", "concatenate"), shape.cat),
    **dict.fromkeys(("stack", "_stack"), shape.stack),
    **reduce.RULES,
    **product.RULES,
    **index.RULES,
    **dict.fromkeys(("mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss"), each.loss(2)),
    **dict.fromkeys(("binary_cross_entropy", "binary_cross_entropy_with_logits"), each.loss(-1)),
    **dict.fromkeys(
        ("cross_entropy_loss", "nll_loss", "nll_loss_nd", "nll_loss_forward", "nll_loss2d_forward", "kl_div"),
        each.loss(-1),
    ),
}  # fmt: skip
#: in-place forms of which the rule is the same
_INPLACE = frozenset(
    "addmm baddbmm addmv scatter scatter_add scatter_reduce index_copy index_add index_fill index_put "
    "_index_put_impl tril triu cumsum cumprod dropout".split()
)


#: of the ordinary ones, those that see to row numbers themselves: all of them stays what it is
_KEEP_COUNTERS = frozenset(("index", "_unsafe_index", "index_put", "slice", "slice_copy"))


@cache
def rule_for(op: str) -> Rule:
    """The rule of ``aten::name.overload``."""
    name = base_name(op)
    if name in RANDOM or (name.endswith("_") and name[:-1] in RANDOM):
        return Rule(None, never="draws random numbers")
    if name in RESHAPES_IN_PLACE:
        return Rule(None, never="changes the shape of a value in place")
    if not op.startswith("aten::"):
        return Rule(None)
    plain = name[:-1] if name.endswith("_") and name[:-1] in _INPLACE else name
    if plain in _CREATING:
        return Rule(_CREATING[plain], True, plain in ("expand", "expand_copy", "broadcast_to", "arange"))
    if name in _STRUCTURAL:
        return Rule(_STRUCTURAL[name], False, True)
    if plain in _ORDINARY:
        return Rule(_ORDINARY[plain], False, plain in _KEEP_COUNTERS)
    if each.is_elementwise(name):
        return Rule(each.elementwise, False, name in each.KEEP_COUNTERS)
    return Rule(None)
