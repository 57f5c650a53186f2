"""Which programs can run by parts of a batch, and why others cannot."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch import Tensor
from torch.nn import functional as f

from genie.scheduler.batch_axis import part_spec, prove
from genie.scheduler.batch_rules import RANDOM, RESHAPES_IN_PLACE, rule_for
from genie.scheduler.plan import BatchAxes
from genie.scheduler.where import Axis
from genie.wire.messages import TensorSpec
from tests.scheduler.batch_parts import Caught, caught, check_parts

B = 4
SPLITS = ([1, 3], [2, 2])


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    torch.manual_seed(3)
    with torch.no_grad():
        yield


def record(run: Callable[..., object], *inputs: Tensor) -> Caught:
    """The one program of ``run``, with ``inputs`` as externals."""

    def on_device() -> None:
        moved = [x.to("genie") for x in inputs]
        out = run(*moved)
        for t in out if isinstance(out, (list, tuple)) else [out]:
            assert isinstance(t, Tensor)
            t.cpu()

    programs = [c for c in caught(on_device) if c.graph.nodes]
    return max(programs, key=lambda c: len(c.graph.nodes))


def why_not(run: Callable[..., object], *inputs: Tensor) -> str:
    case = record(run, *inputs)
    answer = prove(case.graph, case.batch(inputs))
    assert isinstance(answer, str), answer
    return answer


def rows(*shape: int) -> Tensor:
    return torch.randn(B, *shape)


W = torch.randn(B, B)  # a weight whose sizes are the batch's


def numbers() -> Tensor:
    return torch.arange(B, device="genie")


def indexed_numbers(x: Tensor) -> Tensor:
    return x + numbers()[:, None].expand(B, 2)[:, torch.tensor([0, 1, 0, 1, 0, 1]).to("genie")]


def written_numbers(x: Tensor) -> Tensor:
    return (x * 2).index_put_((numbers(),), numbers().float()[:, None] * 1)


REFUSED: dict[str, tuple[Callable[[Tensor], object], str]] = {
    "mean over the batch": (lambda x: x.mean(0), "aten::mean.dim reduces over the batch"),
    "loss": (lambda x: (x * x).mean(), "aten::mean.default reduces over the batch"),
    "mse loss": (lambda x: f.mse_loss(x, x * 2), "over the batch"),
    "centred": (lambda x: x - x.mean(0), "aten::mean.dim reduces over the batch"),
    "argmax over the batch": (lambda x: x.argmax(0), "reduces over the batch"),
    "gram": (lambda x: x @ x.T, "has the batch in two dimensions"),
    "product over rows": (lambda x: x.T @ x, "sums over the batch"),
    "flip": (lambda x: x.flip(0), "aten::flip.default reverses the batch"),
    "cumsum": (lambda x: x.cumsum(0), "aten::cumsum.default accumulates along the batch"),
    "roll": (lambda x: x.roll(1, 0), "aten::roll.default rolls the batch"),
    "roll of all": (lambda x: x.roll(1), "rolls the batch"),
    "softmax": (lambda x: x.softmax(0), "normalises over the batch"),
    "sort": (lambda x: x.sort(0)[0], "sorts the batch"),
    "topk": (lambda x: x.topk(2, 0)[0], "selects among the batch"),
    "slice": (lambda x: x[1:] * 2, "aten::slice.Tensor cuts the batch"),
    "select": (lambda x: x[0] * 2, "takes one row"),
    "split": (lambda x: x.split(2)[0] * 2, "splits the batch"),
    "unbind": (lambda x: x.unbind(0)[0] * 2, "takes the rows of the batch apart"),
    "index": (lambda x: x[torch.tensor([1, 0, 3, 2]).to("genie")], "picks among the rows"),
    "index_select": (lambda x: x.index_select(0, torch.tensor([0, 2]).to("genie")), "picks among the rows"),
    "swapped": (lambda x: x.view(6, B) * 2, "mixes the rows of the batch"),
    "transposed and merged": (lambda x: x.T.reshape(-1) * 2, "mixes the rows of the batch"),
    "numbered": (
        lambda x: x + torch.arange(B, device="genie", dtype=torch.float)[:, None], "numbers of rows",
    ),
    "numbers read": (lambda x: torch.arange(B, device="genie")[:, None] * (x * 2).long(), "numbers of rows"),
    "numbers as floats": (
        lambda x: x + torch.arange(B, device="genie").to(torch.float)[:, None], "numbers of rows",
    ),
    "some of the numbers": (
        lambda x: x[torch.arange(B, device="genie")[1:]], "picks among the rows",
    ),
    "numbers indexed": (indexed_numbers, "rows of its own"),
    "numbers written": (written_numbers, "writes a whole value into the batch"),
    "numbers that leave": (
        lambda x: (lambda n: [x[n], n])(torch.arange(B, device="genie")), "numbers the rows of the batch",
    ),
    "rows of a weight by number": (
        lambda x: x[torch.arange(B, device="genie")] + W.to("genie")[torch.arange(B, device="genie")][:, :1],
        "rows of its own",
    ),
    "a weight per row": (lambda x: x[:, :B] * W.to("genie"), "meets the batch with a value of 4 rows"),
    "a weight beside it": (lambda x: torch.cat([x, W.to("genie")], 1), "rows of its own"),
    "concatenated along it": (lambda x: torch.cat([x, x * 2]), "concatenates along the batch"),
    "padded": (lambda x: f.pad(x, (0, 0, 1, 0)), "pads the batch"),
    "repeated": (lambda x: x.repeat(2, 1), "repeats the batch"),
    "squeezed": (lambda x: (x * 2).squeeze(), "would remove a batch of one row"),
    "tril": (lambda x: x.tril(), "treats each row of the batch otherwise"),
    "batch norm in training": (
        lambda x: f.batch_norm(x, None, None, None, None, training=True), "over the batch",
    ),
    "dropout": (lambda x: f.dropout(x, 0.5, training=True), "draws random numbers"),
    "noise": (lambda x: x + torch.rand(6, device="genie"), "draws random numbers"),
    "data-dependent": (lambda x: (x * 2).nonzero(), "shape that depends on data"),
    "strided": (lambda x: (x * 2).as_strided((B, 2), (6, 1)), "aten::as_strided.default has no rule"),
    "no rule": (lambda x: torch.linalg.inv(x[:, :B] + 0 * x[:, :B]), "has no rule"),
    "written to an input": (lambda x: x.add_(1), "writes to a value from outside"),
    "written to a view of an input": (lambda x: x[:, 0].mul_(2), "writes to a value from outside"),
    "written to one row for all": (
        lambda x: (torch.zeros(1, 6, device="genie") + 1).copy_(x[1:2]), "cuts the batch",
    ),
    "written to a whole value": (
        lambda x: (W.to("genie") * 2).copy_(x[:, :B]), "meets the batch with a value of 4 rows",
    ),
    "whole and split": (
        lambda x: (lambda z: (z.sum(0), z + x))(torch.zeros(B, 6, device="genie")),
        "aten::sum.dim_IntList reduces over the batch",
    ),
    "split and whole": (
        lambda x: (lambda z: (z + x, z.sum(0)))(torch.zeros(B, 6, device="genie")),
        "aten::sum.dim_IntList reduces over the batch",
    ),
    "batch in both dimensions of a factory": (
        lambda x: torch.zeros(B, B, device="genie") + x[:, :1] + x[:, :1].T, "value of 4 rows of its own",
    ),
    "squared distances": (lambda x: (x[:, None] - x[None]).square().sum(-1), "two dimensions"),
    "attention over the batch": (
        lambda x: f.scaled_dot_product_attention(x[None], x[None], x[None]), "attends along the batch",
    ),
    "looked up in": (lambda x: f.embedding(torch.tensor([0, 1]).to("genie"), x), "looks up in the batch"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_mixes_rows_is_refused_by_the_instruction_that_does(name: str) -> None:
    run, reason = REFUSED[name]
    answer = why_not(run, rows(6))
    assert reason in answer and answer.startswith("instruction ")


def attention(x: Tensor) -> Tensor:
    """By hand, in merged form: (B, 3, 8) with 4 heads of 2."""
    q = x.view(B, 3, 4, 2).transpose(1, 2).reshape(B * 4, 3, 2)
    scores = torch.baddbmm(torch.zeros(B * 4, 3, 3, device="genie"), q, q.transpose(1, 2), alpha=0.5)
    return (scores.softmax(-1) @ q).view(B, 4, 3, 2).transpose(1, 2).reshape(B, 3, 8)


def by_mask(x: Tensor) -> Tensor:
    y = x * 2
    y[y > 0] = 1.0
    return y


def written(x: Tensor) -> Tensor:
    out = torch.zeros(B, 3, 8, device="genie")
    out[:, :2].copy_(x[:, 1:])
    return out.masked_fill_(x > 1, 0.5).add_(x)


def last_token(x: Tensor) -> Tensor:
    return x[torch.arange(B, device="genie"), x.sum(-1).argmax(-1)]


def put(x: Tensor) -> Tensor:
    y = x * 1
    y[torch.arange(B, device="genie"), x.sum(-1).argmax(-1)] = x[:, 0]
    return y


def class_token(x: Tensor) -> Tensor:
    token = torch.ones(1, 1, 8).to("genie") * 3
    return torch.cat([token.expand(B, -1, -1), x], 1)


def unused_test(x: Tensor) -> Tensor:
    (x > 0).all()
    return x + 1


PROVEN: dict[str, Callable[[Tensor], object]] = {
    "merged rows": lambda x: torch.addmm(
        torch.ones(8, device="genie"), x.view(-1, 8), torch.ones(8, 8, device="genie")
    ).view(B, 3, 8),
    "merged heads": attention,
    "product in place": lambda x: torch.zeros(B, 3, 3, device="genie").baddbmm_(x, x.transpose(1, 2)),
    "numbers of another dtype": lambda x: x[torch.arange(B, device="genie").int().long().view(B, 1), 1:],
    "all of the numbers": lambda x: x[torch.arange(B, device="genie")[:].view(B, 1), 1:],
    "class token": class_token,
    "last token": last_token,
    "written by number": put,
    "written in place": written,
    "written under a mask": by_mask,
    "a test that nobody reads": unused_test,
    "ones": lambda x: x * torch.ones(B, 1, 8, device="genie"),
    "full": lambda x: torch.where(x > 0, x, torch.full((B, 3, 8), 2.0, device="genie")),
    "new_zeros": lambda x: torch.cat([x, x.new_zeros(B, 1, 8)], 1),
    "a square factory with one batch": lambda x: torch.zeros(B, B, device="genie") + x[:, 0, :B],
    "a square factory, the other way": lambda x: torch.zeros(B, B, device="genie") + x[:, 0, :1].t(),
    "repeated up to the batch": lambda x: x + (torch.ones(1, 3, 8).to("genie") * 2).repeat(B, 1, 1),
    "interleaved up to the batch": lambda x: x
    + (torch.ones(1, 3, 8).to("genie") * 2).repeat_interleave(B, 0),
    "interleaved heads": lambda x: x.view(B, 3, 2, 4).repeat_interleave(3, 2),
    "normalised": lambda x: f.normalize(x, dim=-1),
    "a literal that is no size": lambda x: x * B / B + B,
    "full slice": lambda x: x[:B, :2] * 2,
    "stacked": lambda x: torch.stack([x, x.flip(1)], 1).flatten(0, 1).sum(-1),
    "reductions": lambda x: [x.mean(-1), x.amax(1), x.std(2), x.max(1)[0], x.norm(dim=-1), x.logsumexp(1)],
    "along others": lambda x: [x.cumsum(1), x.sort(-1)[0], x.topk(2, -1)[1], x.softmax(1), x.roll(1, 2)],
    "padding": lambda x: f.pad(x, (1, 2, 0, 1)),
    "gathered": lambda x: x.gather(1, x.argsort(1)),
    "scattered": lambda x: torch.zeros(B, 3, 8, device="genie").scatter(1, x.argsort(1), x),
    "group norm": lambda x: f.group_norm(x.transpose(1, 2), 4),
    "pooling": lambda x: [f.max_pool1d(x, 2), f.avg_pool1d(x, 2), f.adaptive_avg_pool1d(x, 3)],
    "resampled": lambda x: f.interpolate(x[:, None], scale_factor=2),
    "convolved": lambda x: f.conv1d(x, torch.ones(5, 3, 3, device="genie") * 0.1, padding=1),
    "masked attention": lambda x: f.scaled_dot_product_attention(
        x[:, None], x[:, None], x[:, None], (x[:, None, :, :3] > 0) | True
    ),
    "whole beside it": lambda x: [x * 2, torch.zeros(B, B, device="genie").sum(0)],
    "in another dimension": lambda x: x.permute(2, 1, 0) * torch.ones(3, B, device="genie"),
    "clip product": lambda x: (torch.ones(5, 8).to("genie") * 2) @ x[:, 0].t(),
}  # fmt: skip


@pytest.mark.parametrize("name", PROVEN)
def test_parts_are_the_rows_of_the_whole(name: str) -> None:
    x = rows(3, 8)
    check_parts(record(PROVEN[name], x), [x], SPLITS)


@pytest.mark.parametrize("name", ["merged heads", "class token", "last token", "written in place"])
def test_sizes_that_coincide_are_told_apart_by_meaning(name: str) -> None:
    """A batch of 4 over 4 heads, in other parts than elsewhere."""
    x = rows(3, 8)
    case = record(PROVEN[name], x)
    check_parts(case, [x], [[3, 1], [2, 1, 1]])


def test_only_literals_that_mean_the_batch_are_scaled() -> None:
    x = rows(B, B)

    def run(x: Tensor) -> Tensor:
        return (x.view(B, B * B).view(B, B, B).transpose(1, 2) + torch.zeros(B, B, device="genie")) * B

    case = record(run, x)
    axes = check_parts(case, [x], SPLITS)
    assert {case.graph.nodes[n].name: found for n, found in axes.literals.items()} == {"view": ((0, 1),)}
    assert len(axes.literals) == 2


def test_a_factory_is_scaled_only_if_it_meets_the_batch() -> None:
    x = rows(B)

    def run(x: Tensor) -> list[Tensor]:
        return [x + torch.zeros(B, B, device="genie"), torch.ones(B, B, device="genie").sum(0)]

    axes = check_parts(record(run, x), [x], SPLITS)
    assert list(axes.literals.values()) == [((0, 1),)]


def test_numbers_of_rows_and_unused_sums_are_local_to_a_part() -> None:
    x = rows(3, 8)
    for name, op in (("last token", "arange"), ("a test that nobody reads", "all")):
        case = record(PROVEN[name], x)
        axes = check_parts(case, [x], SPLITS)
        assert {case.graph.wiring.producer[v].name for v in axes.local} == {op}


def test_a_sum_over_the_batch_that_leaves_is_refused_though_another_result_would_not_be() -> None:
    answer = why_not(lambda x: [(x * 2).all(), x + 1], rows(3))
    assert "reduces over the batch" in answer


def test_inputs_without_a_common_batch_are_refused() -> None:
    x, y = rows(6), torch.randn(B + 1, 6)
    case = record(lambda x, y: x.sum(1).sum() + y.sum(), x, y)
    assert "no common batch" in str(prove(case.graph, case.batch([x, y])))


def test_the_conflict_names_both_instructions() -> None:
    answer = why_not(lambda x: (lambda z: [z.flip(0), z + x])(torch.zeros(B, 6, device="genie")), rows(6))
    assert "aten::add.Tensor" in answer and "aten::flip.default reverses the batch" in answer


STEPS: dict[str, Callable[[Tensor], Tensor]] = {
    "tanh": torch.tanh,
    "swap": lambda t: t.transpose(0, 1),
    "last": lambda t: t.transpose(-1, -2),
    "merge": lambda t: t.reshape(-1, t.shape[-1]).reshape(t.shape),
    "merge right": lambda t: t.reshape(t.shape[0], -1).reshape(t.shape),
    "flat": lambda t: t.flatten(0, 1).unsqueeze(1),
    "split": lambda t: t.unflatten(0, (2, t.shape[0] // 2)).flatten(1, 2) if t.shape[0] % 2 == 0 else t,
    "sum": lambda t: t.sum(1, keepdim=True) + t,
    "sum0": lambda t: t.sum(0, keepdim=True) + t,
    "zeros": lambda t: t + torch.zeros(t.shape, device="genie"),
    "ones row": lambda t: t * torch.ones(t.shape[0], 1, 1, device="genie"),
    "token": lambda t: torch.cat([t, t.new_ones(1, 1, t.shape[2]).expand(t.shape[0], 1, -1)], 1),
    "softmax": lambda t: t.softmax(1),
    "cumsum": lambda t: t.cumsum(2),
    "bmm": lambda t: t @ t.transpose(1, 2),
    "cut": lambda t: t[:, : max(1, t.shape[1] - 1)],
    "cut0": lambda t: t[: max(1, t.shape[0] - 1)],
    "pick": lambda t: t[torch.arange(t.shape[0], device="genie"), :1],
    "in place": lambda t: (t * 1).add_(t[:1, :1, :1] if t.shape[0] == 1 else 1),
    "pad": lambda t: f.pad(t, (1, 0)),
}  # fmt: skip


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(
    chain=st.lists(st.sampled_from(sorted(STEPS)), min_size=1, max_size=6), other=st.sampled_from([2, 3, 4])
)
def test_whatever_is_proven_of_random_chains_is_true(chain: list[str], other: int) -> None:
    torch.manual_seed(len(chain))
    x = torch.randn(B, other, 4)

    def run(t: Tensor) -> Tensor:
        for name in chain:
            t = STEPS[name](t)
        return t * 2

    case = record(run, x)
    if isinstance(prove(case.graph, case.batch([x])), BatchAxes):
        check_parts(case, [x], [[1, 3], [2, 2]])


def test_every_op_that_draws_random_numbers_is_known() -> None:
    from genie.wire.allowed_ops import ALLOWED_BASES

    ruled = {"dropout", "scaled_dot_product_attention", "_scaled_dot_product_flash_attention_for_cpu"}
    for name in ALLOWED_BASES:
        packet = getattr(torch.ops.aten, name, None)
        overloads = [getattr(packet, o) for o in packet.overloads()] if packet is not None else []
        base = name.removesuffix("_") if name != "__or__" else name
        if any(torch.Tag.nondeterministic_seeded in o.tags for o in overloads):
            assert base in RANDOM | ruled, f"{name} draws random numbers: add it to RANDOM"
        if any(torch.Tag.inplace_view in o.tags for o in overloads):
            assert name in RESHAPES_IN_PLACE | {"detach_"}, (
                f"{name} changes shapes: add it to RESHAPES_IN_PLACE"
            )


@pytest.mark.parametrize("name", ["aten::rand.default", "aten::uniform_.default", "genie::manual_seed"])
def test_random_ops_are_refused_whatever_their_inputs(name: str) -> None:
    assert rule_for(name).never == "draws random numbers"


def test_a_parts_geometry_is_dense_in_the_order_of_the_whole() -> None:
    channels_last = TensorSpec("float32", [4, 3, 5, 6], [90, 1, 18, 3], 7)
    assert part_spec(channels_last, Axis(0), 1, 4) == TensorSpec("float32", [1, 3, 5, 6], [90, 1, 18, 3], 0)
    inner = TensorSpec("int64", [2, 12], [1, 2], 0)
    assert part_spec(inner, Axis(1, 3), 2, 4) == TensorSpec("int64", [2, 6], [1, 2], 0)
    with pytest.raises(ValueError, match="does not hold 5 rows of 3"):
        part_spec(inner, Axis(1, 3), 2, 5)
