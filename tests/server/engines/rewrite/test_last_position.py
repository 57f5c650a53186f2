"""Positions that nobody reads are not computed; those that are come out the same."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from genie.server.engines.rewrite.facts import spec
from genie.server.engines.rewrite.last_position import last_position
from tests.server.engines.rewrite.programs import captured, rewrite

TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


def inputs(batch: int = 1) -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    shapes = (batch, 7, 16), (32, 16), (16, 32), (16,), (32,)
    return [torch.randn(s, generator=g) for s in shapes]


def head(x: Tensor, w: Tensor, v: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return F.linear(F.layer_norm(x, [16], a), w)


def mlp(x: Tensor, w: Tensor, v: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """As GPT-2 has it: rows to and from addmm, a residual."""
    h = torch.addmm(b, F.layer_norm(x, [16], a).view(-1, 16), w.t()).view(*x.shape[:2], 32)
    return x + torch.addmm(a, F.gelu(h).view(-1, 32), v.t()).view(x.shape)


def rows(graph: torch.fx.Graph) -> set[int]:
    """How many positions the products and norms work on."""
    found = set()
    for n in graph.nodes:
        if n.op == "call_function" and n.target._schema.name[6:] in ("linear", "addmm", "layer_norm", "gelu"):
            shape = spec(n).shape
            found.add(shape[0] if len(shape) == 2 else shape[0] * shape[1])
    return found


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(
    ("take", "positions"),
    [
        (lambda y: y[:, -1:], 1), (lambda y: y[:, -1], 1), (lambda y: y[:, 0], 1), (lambda y: y[:, 2:5], 3),
        (lambda y: y[:, -2], 1), (lambda y: y[:, -3:], 3),
    ],
)  # fmt: skip
@pytest.mark.parametrize("function", [head, mlp], ids=["head", "mlp"])
def test_only_what_is_read_is_computed(function, take, positions: int, batch: int) -> None:
    run = captured(lambda *v: torch.log_softmax(take(function(*v)), -1), *inputs(batch))
    changed, graph = rewrite(run, last_position, **TOLERANCE)
    assert changed == 1 and rows(graph) == {batch * positions}


def test_the_last_mlp_norm_and_head_after_attention() -> None:
    def layer(x: Tensor, *rest: Tensor) -> Tensor:
        attended = F.scaled_dot_product_attention(x, x, x)
        return torch.log_softmax(head(mlp(attended, *rest), *rest)[:, -1], -1)

    changed, graph = rewrite(captured(layer, *inputs(2)), last_position, **TOLERANCE)
    assert changed == 1 and rows(graph) == {2}


@pytest.mark.parametrize("batch", [1, 2])
def test_what_is_read_in_full_stays(batch: int) -> None:
    def both(*v: Tensor) -> tuple[Tensor, Tensor]:
        hidden = mlp(*v)
        logits = head(hidden, *v[1:])
        return hidden, torch.log_softmax(logits[:, -1], -1)

    run = captured(both, *inputs(batch))
    changed, graph = rewrite(run, last_position, **TOLERANCE)
    assert changed == 1 and rows(graph) == {7 * batch, batch}  # the MLP for all, the head for the last


@pytest.mark.parametrize(
    "function",
    [
        lambda *v: (lambda y: (y, y[:, -1] * 1))(head(*v)),  # kept
        lambda *v: (lambda y: y[:, -1] + y.sum(1))(head(*v)),
        lambda *v: (lambda y: y[:, -1] * y[:, 0])(head(*v)),  # two different positions
        lambda *v: head(*v)[:, ::2] * 1,
        lambda *v: head(*v)[:, 0:] * 1,  # all of them
        lambda *v: head(*v)[..., -1] * 1,  # not positions
        lambda *v: F.layer_norm(v[0], [7, 16])[:, -1] * 1,  # mixes positions
        lambda *v: torch.softmax(v[0], 1)[:, -1] * 1,
        lambda *v: v[0].cumsum(1)[:, -1] * 1,
        lambda *v: (v[0].transpose(1, 2) @ v[0])[:, -1] * 1,
        lambda x, *v: F.linear(x.transpose(0, 1), v[0])[:, -1] * 1 if x.shape[0] == 1 else x,
        lambda *v: (lambda y: (y.add_(1), y[:, -1] * 1)[1])(head(*v)),  # written to
    ],
)
def test_what_needs_all_positions_stays(function) -> None:
    changed, _ = rewrite(captured(function, *inputs()), last_position)
    assert changed == 0


def test_a_kept_slice_has_its_strides() -> None:
    """Of a batch, the slice of all logits has gaps, which one that is computed alone has not."""
    assert rewrite(captured(lambda *v: head(*v)[:, -1], *inputs(1)), last_position, **TOLERANCE)[0] == 1
    assert rewrite(captured(lambda *v: head(*v)[:, -1], *inputs(2)), last_position)[0] == 0
