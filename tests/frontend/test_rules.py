"""Shape rules say what PyTorch does, to the stride."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import genie
from genie.frontend import rules
from genie.frontend.program import Outcome, Program
from genie.frontend.session import Session
from genie.frontend.specs import Spec, spec_of, to_wire

aten = torch.ops.aten

SHAPES = [(3,), (1, 4), (4, 1), (2, 1, 5), (1, 2, 1, 8), (1, 1, 3, 1), (2, 3, 1, 1), (2, 1, 4, 4), (2, 0, 3)]


def laid_out(shape: tuple[int, ...]) -> list[Tensor]:
    """Dense tensors of this shape in all orders of dimensions, and a slice of a wider one."""
    tensors = []
    for order in itertools.permutations(range(len(shape))):
        base = torch.empty([shape[d] for d in order])
        tensors.append(base.permute([order.index(d) for d in range(len(shape))]))
    return [*tensors, torch.empty(*shape[:-1], shape[-1] + 2)[..., 1:-1]]


def described(t: Tensor) -> Tensor:
    t._spec = spec_of(t)  # type: ignore[attr-defined]
    return t


def check(op: torch._ops.OpOverload, *args: object, **kwargs: object) -> bool:
    """Compares a rule with PyTorch on the CPU; False where the rule leaves the answer to meta."""
    predicted = rules.infer(op, args, kwargs)
    if predicted is not None:
        real = op(*args, **kwargs)
        assert isinstance(predicted, Spec) and predicted is spec_of(real), (op, to_wire(spec_of(real)))
    return predicted is not None


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_cat(shape: tuple[int, ...]) -> None:
    known = 0
    for a, b in itertools.product(laid_out(shape), repeat=2):
        for dim in range(-len(shape), len(shape)):
            known += check(aten.cat.default, [described(a), described(b)], dim)
    assert known


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_arithmetic(shape: tuple[int, ...]) -> None:
    known = 0
    for op in (aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor):
        for a, b in itertools.product(laid_out(shape), repeat=2):
            known += check(op, described(a), described(b))
            for dtype, number in itertools.product((torch.float16, torch.int64, torch.bool), (2, 2.5)):
                known += check(op, described(a.to(dtype)), number)
                known += check(op, described(a), described(b.to(dtype)))
    assert known


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_clone_and_isin(shape: tuple[int, ...]) -> None:
    formats = [torch.contiguous_format, torch.preserve_format]
    formats += [torch.channels_last] * (len(shape) == 4)
    known = 0
    for t in map(described, laid_out(shape)):
        known += check(aten.clone.default, t)
        known += sum(check(aten.clone.default, t, memory_format=f) for f in formats)
        assert check(aten.isin.Tensor_Tensor, t, described(torch.ones(3)))
        assert check(aten.isin.Tensor_Tensor, t, described(torch.ones(300)), invert=True)
    assert known


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_slice(shape: tuple[int, ...]) -> None:
    ends = (None, 0, 1, 2, -1, -2, -9, 9, 2**63 - 1)
    for t in map(described, laid_out(shape)):
        for dim, start, end, step in itertools.product(range(-1, len(shape)), ends, ends, (1, 2)):
            assert check(aten.slice.Tensor, t, dim, start, end, step)


def test_attention_of_one_query_has_one_layout() -> None:
    q, k = described(torch.randn(2, 3, 1, 8)), described(torch.randn(2, 3, 5, 8))
    op = aten.scaled_dot_product_attention.default
    predicted = rules.infer(op, (q, k, k), {})
    assert rules.is_certain(op, (q, k, k)) and isinstance(predicted, Spec)
    for backend in (torch.nn.attention.SDPBackend.MATH, torch.nn.attention.SDPBackend.FLASH_ATTENTION):
        with torch.nn.attention.sdpa_kernel(backend):
            real = op(q, k, k)
        pairs = zip(real.shape, real.stride(), predicted.stride, strict=True)
        assert real.shape == predicted.shape and all(n == 1 or a == b for n, a, b in pairs)
    assert not rules.is_certain(op, (k, k, k))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "shape", [(1, 3, 5, 6), (2, 4, 1, 5), (1, 1, 4, 4), (17, 4, 4, 1), (1, 64, 20, 20)], ids=str
)
def test_convolution_in_channels_last(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    formats, settings = (torch.contiguous_format, torch.channels_last), ((1, 0, 1), (2, 1, 1), (1, 2, 2))
    channels = shape[1]
    weights = [
        torch.randn(made, channels // groups, size, size, dtype=dtype).contiguous(memory_format=form)
        for made, size, groups in ((2, 1, 1), (1, 3, 1), (channels, 1, channels), (2 * channels, 3, channels))
        for form in formats
    ]
    known = 0
    for x, w in itertools.product(laid_out(shape), weights):
        for step, pad, spread in settings:
            if min(shape[2:]) + 2 * pad < spread * (w.shape[2] - 1) + 1:
                continue  # PyTorch refuses
            pairs, groups = ([step] * 2, [pad] * 2, [spread] * 2), channels // w.shape[1]
            inputs = described(x.to(dtype)), described(w), None
            known += check(aten.conv2d.default, *inputs, *pairs, groups)
            known += check(aten.convolution.default, *inputs, *pairs, False, [0, 0], groups)
    assert known


def test_convolutions_that_are_left_to_meta() -> None:
    x = described(torch.randn(2, 4, 5, 5).contiguous(memory_format=torch.channels_last))
    w = described(torch.randn(4, 4, 3, 3))
    for args in (
        (x, described(torch.randn(4, 3, 3, 3)), None),  # channels do not fit
        (x, described(w.double()), None),
        (x, w, described(torch.randn(3))),
        (x, described(torch.randn(4, 4, 6, 6)), None),  # the kernel is wider than the image
        (described(x[:, :, 1:]), w, None),
        (described(x[:, :, :1, :1]), described(w[:, :, :1, :1]), None),
        (described(x.double()), described(w.double()), None),
        (described(x.contiguous()), w, None),
    ):
        assert rules.infer(aten.conv2d.default, args, {}) is None
    transposed = [1, 1], [0, 0], [1, 1], True, [0, 0], 1
    assert rules.infer(aten.convolution.default, (x, w, None, *transposed), {}) is None


def test_a_growing_cache_needs_no_checks_on_the_way() -> None:
    with torch.no_grad(), genie.local() as session:
        step = decode_step(session)
        for _ in range(2):
            step().cpu()
        checked: list[list[str]] = []
        execute = session.executor.execute

        def noting(program: Program, fetch: list[int], describe: list[int]) -> Outcome:
            checked.append([program.entries[i].op for i in program.fresh])
            return execute(program, fetch, describe)

        session.executor.execute = noting  # type: ignore[method-assign]
        for _ in range(5):
            step().cpu()
        assert checked == [[]] * 5


def decode_step(session: Session) -> Callable[[], Tensor]:
    query = torch.randn(1, 2, 1, 8).to("genie")
    state = torch.randn(1, 2, 3, 8).to("genie")
    positions = torch.arange(3).to("genie")

    def step() -> Tensor:
        nonlocal state, positions
        state = torch.cat([state, (query * 2).view(1, 1, 2, 8).transpose(1, 2)], 2)
        positions = torch.cat([positions, positions[-1:] + 1])
        return torch.nn.functional.scaled_dot_product_attention(query, state, state)

    return step
