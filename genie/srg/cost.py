"""What one op costs, from shapes alone: FLOPs (a multiply-add is two) and bytes of memory traffic.

FLOPs follow `torch.utils.flop_counter`, which the tests compare against: matmul 2mnk; convolution
two for each weight of one filter and output element; attention both of its matmuls over the full
square, masked or not. Bytes are the elements read plus the elements written, once each, as in a
roofline without a cache; gathers count what they touch, views nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

from genie.srg.graph import Cost, nbytes, numel
from genie.wire.messages import TensorSpec

Specs = Sequence[TensorSpec | None]

#: position of the left operand, whose last dimension is summed over
_MATMULS = {"mm": 0, "bmm": 0, "matmul": 0, "linear": 0, "addmm": 1, "baddbmm": 1}
_CONVOLUTIONS = frozenset({"conv1d", "conv2d", "conv3d"})
_TRANSPOSED = frozenset({"conv_transpose1d", "conv_transpose2d", "conv_transpose3d"})
_ATTENTIONS = frozenset({
    "scaled_dot_product_attention", "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention", "_scaled_dot_product_fused_attention_overrideable",
})  # fmt: skip
_GATHERS = {"embedding": 1, "index_select": 1, "gather": 1, "index": 1, "_unsafe_index": 1}
#: in-place scatters: position of the first operand that is read whole
_SCATTERS = {"index_copy_": 1, "index_put_": 1, "_index_put_impl_": 1, "scatter_": 1, "copy_": 1}
CONVOLUTIONS = _CONVOLUTIONS | _TRANSPOSED | {"convolution", "_convolution"}
#: ops that do a model's real arithmetic
COMPUTE = frozenset(_MATMULS) | CONVOLUTIONS | _ATTENTIONS
ATTENTIONS = _ATTENTIONS


def cost(name: str, args: list, inputs: Specs, outputs: Specs, written: Specs, is_view: bool) -> Cost:
    """``name`` without namespace and overload; ``args`` are its patterns; ``written``: in-place results."""
    if is_view:
        return Cost(0, 0)
    return Cost(_flops(name, args, inputs, outputs), _traffic(name, inputs, outputs, written))


def _flops(name: str, args: list, inputs: Specs, outputs: Specs) -> int | None:
    if name not in COMPUTE or not outputs or any(s is None for s in (*inputs, *outputs[:1])):
        return None
    shapes = [s.shape for s in inputs if s is not None]
    result = outputs[0]
    assert result is not None
    if name in _MATMULS:
        return 2 * numel(result) * shapes[_MATMULS[name]][-1]
    if name in CONVOLUTIONS:
        source, weight = inputs[0], inputs[1]
        assert source is not None and weight is not None
        transposed = name in _TRANSPOSED or (name.endswith("convolution") and args[6] == ["b", True])
        return 2 * numel(source if transposed else result) * numel(weight) // max(weight.shape[0], 1)
    query, (length, width) = inputs[0], shapes[2][-2:]
    assert query is not None
    rows = numel(query) // max(query.shape[-1], 1)
    return 2 * rows * length * (query.shape[-1] + width)


def _traffic(name: str, inputs: Specs, outputs: Specs, written: Specs) -> int:
    made = sum(map(nbytes, outputs))
    if name in _GATHERS:
        return sum(map(nbytes, inputs[_GATHERS[name] :])) + 2 * made
    if name in _SCATTERS:
        return sum(map(nbytes, inputs[_SCATTERS[name] :])) + nbytes(inputs[-1])
    return sum(map(nbytes, inputs)) + made + sum(map(nbytes, written))
