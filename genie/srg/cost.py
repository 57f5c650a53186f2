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
    flops, traffic = _flops(name, args, inputs, outputs), _traffic(name, inputs, outputs, written)
    return Cost(flops, traffic, dims(name, args, inputs, outputs, written), _dtype(inputs, outputs, written))


def _dtype(inputs: Specs, outputs: Specs, written: Specs) -> str:
    """Of the numbers: indices, masks and comparisons have others."""
    known = [s.dtype for s in (*outputs, *written, *inputs) if s is not None]
    floating = [d for d in known if d.startswith(("float", "bfloat", "complex"))]
    return (floating or known or ["float32"])[0]


def dims(name: str, args: list, inputs: Specs, outputs: Specs, written: Specs) -> tuple[int, ...]:
    """The sizes of one op that its time depends on, beside FLOPs and bytes:

    matmuls      rows m (over all leading dimensions), n, k, matrices, 1 if the right operand's rows are
                 its columns in memory (as in `linear`)
    convolutions images, output positions, input channels of a group, output channels of one, groups,
                 positions of the kernel, input positions by output positions
    attentions   batch, heads, queries, keys, head's size, 1 with a mask
    all others   elements (the most of any operand), elements of the last dimension of the first
                 operand, elements by elements of the result, 1 if an operand is not dense

    () where a spec is not known.
    """
    if any(s is None for s in (*inputs, *outputs)):
        return ()
    known = [s for s in inputs if s is not None]
    results = [s for s in (*outputs, *written) if s is not None]
    if not results or not known:
        row = results[0].shape[-1] if results and results[0].shape else 1
        return (max(map(numel, results), default=0), row, 1, 0)
    result = results[0]
    if name in _MATMULS and len(known) > _MATMULS[name] + 1:
        return _matmul_dims(name, known[_MATMULS[name]], known[_MATMULS[name] + 1], result)
    if name in CONVOLUTIONS and len(known) > 1 and len(result.shape) > 2:
        weight, source = known[1].shape, known[0].shape
        places, kernel = _product(result.shape[2:]), _product(weight[2:])
        groups = max(1, source[1] // max(weight[1], 1))
        ratio = max(1, round(_product(source[2:]) / max(places, 1)))
        return (result.shape[0], places, weight[1], max(1, result.shape[1] // groups), groups, kernel, ratio)
    if name in _ATTENTIONS and len(known) > 2 and len(known[0].shape) == 4:
        query, key = known[0].shape, known[1].shape
        return (*query[:3], key[2], query[3], int(len(known) > 3))
    elements = max(map(numel, (*known, *results)))
    shape = known[0].shape
    scattered = int(any(not _is_dense(s) for s in known if numel(s) * 2 > elements))
    return (elements, shape[-1] if shape else 1, max(1, round(elements / max(numel(result), 1))), scattered)


def _matmul_dims(name: str, left: TensorSpec, right: TensorSpec, result: TensorSpec) -> tuple[int, ...]:
    k = left.shape[-1] if left.shape else 1
    n = 1 if len(right.shape) < 2 and name != "linear" else result.shape[-1] if result.shape else 1
    matrices = _product(right.shape[:-2])
    rows = numel(result) // max(n * matrices, 1)
    turned = name == "linear" or (len(right.stride) > 1 and right.stride[-1] != 1)
    return (rows, n, k, matrices, int(turned))


def _product(sizes: Sequence[int]) -> int:
    n = 1
    for size in sizes:
        n *= size
    return n


def _is_dense(spec: TensorSpec) -> bool:
    """Without gaps, the last dimension innermost."""
    step = 1
    for size, stride in zip(reversed(spec.shape), reversed(spec.stride), strict=True):
        if size != 1 and stride != step:
            return False
        step *= size
    return True


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
