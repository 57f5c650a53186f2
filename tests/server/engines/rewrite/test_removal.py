"""Copies, duplicates and dead work: gone where nobody can tell, bit by bit the same."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, fx

from genie.server.engines.rewrite.copies import copies
from genie.server.engines.rewrite.dead import dead
from genie.server.engines.rewrite.duplicates import duplicates
from genie.server.engines.specialize import Spec
from tests.server.engines.rewrite.programs import captured, ops, rewrite

aten = torch.ops.aten


def x(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape or (3, 4), generator=torch.Generator().manual_seed(seed))


# --- copies


@pytest.mark.parametrize(
    "passing_on",
    [
        lambda t: t.neg().clone(),
        lambda t: t.neg().to(torch.float32, copy=True),
        lambda t: t.neg().view(3, 4),
        lambda t: t.neg().expand(3, 4),
        lambda t: t.neg() * 1.0,
        lambda t: 1.0 * t.neg(),
        lambda t: t.neg() / 1,
        lambda t: t.neg() * torch.ones(3, 4, device="genie"),
        lambda t: t.argsort() + 0,
        lambda t: (t > 0) | torch.full((3, 4), False, device="genie"),
        lambda t: (t > 0) & torch.full((3, 4), True, device="genie"),
    ],
)
def test_what_only_passes_on_goes(passing_on) -> None:
    changed, graph = rewrite(captured(lambda t: passing_on(t).repeat(2, 1), x()), copies)
    assert changed >= 1
    passing = {"clone", "_to_copy", "view", "expand", "mul", "div", "add", "bitwise_or", "bitwise_and"}
    assert not passing & set(ops(graph))


@pytest.mark.parametrize(
    "function",
    [
        lambda t: t.clone(),  # kept: its keeper may write to it, and must not reach the input
        lambda t: t[:, 1:].clone(),
        lambda t: t.neg().clone().add_(1),  # written to, after the copy
        lambda t: (lambda a: (a.clone(), a.add_(1))[0].abs() + a)(t.neg()),  # the source is written to
        lambda t: t.neg().to(torch.float64).abs(),
        lambda t: t.t().clone(memory_format=torch.contiguous_format).view(-1).abs(),  # another layout
        lambda t: (t.neg() + 0.0).abs(),  # -0.0 + 0.0 is 0.0
        lambda t: (t.neg() * 2.0).abs(),
        lambda t: torch.ones(3, 4, device="genie") / t.neg() + 1.0,
        lambda t: (t.argsort() * 1.0).abs(),  # to float
        lambda t: (t[:1].neg() * torch.ones(3, 4, device="genie")).abs(),  # broadcast
    ],
)
def test_a_copy_that_matters_stays(function) -> None:
    changed, _ = rewrite(captured(function, x()), copies)
    assert changed == 0


def test_views_of_a_removed_copy_are_views_of_its_source() -> None:
    run = captured(lambda t: t.neg().clone()[1:].clone().view(-1) + 1, x())
    changed, graph = rewrite(run, copies)
    made = {n.meta["spec"].storage for n in graph.nodes if n.op == "call_function"}
    assert changed == 2 and len(made) == 2


# --- duplicates


def test_what_is_computed_twice_is_computed_once() -> None:
    def twice(t: Tensor) -> Tensor:
        a = torch.arange(4, device="genie") * 2
        b = torch.arange(4, device="genie") * 2
        return t.t().exp().t() * a + t.t().exp().t() * b

    changed, graph = rewrite(captured(twice, x()), duplicates)
    assert changed == 6
    assert ops(graph).count("exp") == ops(graph).count("arange") == 1


def test_several_results_are_shared() -> None:
    def twice(t: Tensor) -> Tensor:
        first, second = t.exp().split(2, -1)
        third, fourth = t.exp().split(2, -1)
        return first * fourth + second * third + (t.max(0).values + t.max(0).values.sum())[:2]

    run = captured(lambda t: twice(t)[:, :1] * 2, x(2, 4))
    changed, graph = rewrite(run, duplicates)
    assert changed >= 3 and ops(graph).count("exp") == ops(graph).count("max") == 1


@pytest.mark.parametrize(
    "function",
    [
        lambda t: (t.exp(), t.exp()),  # both kept: two values that may be written to
        lambda t: (t.exp()[0], t.exp()[1]),  # both kept, by their views
        lambda t: t.exp().add_(1) + t.exp(),
        lambda t: (lambda a: a.exp() + a.add_(1) + a.exp())(t.neg()),  # written to in between
        lambda t: torch.zeros(3, 4, device="genie").add_(t) * torch.zeros(3, 4, device="genie").sub_(t),
        lambda t: t * 1 + t * 1.0 + t.pow(True) + t.pow(2),
        lambda t: t.sum(0) + t.sum(0, keepdim=True),
    ],
)
def test_different_or_observable_values_stay_apart(function) -> None:
    changed, _ = rewrite(captured(function, x()), duplicates)
    assert changed == 0


def test_the_kept_one_of_two_is_shared() -> None:
    def one_kept(t: Tensor) -> tuple[Tensor, Tensor]:
        a, b = t.exp(), t.exp()
        return a[0], b.sum()

    changed, graph = rewrite(captured(one_kept, x()), duplicates)
    assert changed == 1 and ops(graph).count("exp") == 1


# --- dead work


def test_what_nobody_reads_goes() -> None:
    def wasteful(t: Tensor) -> Tensor:
        t.exp().sum(0).max(0)
        scratch = torch.zeros(4, device="genie")
        scratch[1:].add_(t[0, 1:])  # written to, never read
        return t.neg()

    changed, graph = rewrite(captured(wasteful, x()), dead)
    assert ops(graph) == ["neg"] and changed >= 6


@pytest.mark.parametrize(
    "function",
    [
        lambda t: (lambda a: (a[0].add_(1), a * 1)[1])(t.exp()),
        lambda t: (lambda a: (a[0].add_(1), a)[1])(t.exp()),  # kept
        lambda t: (lambda a: (a.view(-1)[2:].zero_(), a[1] + 1)[1])(t.exp()),
    ],
)
def test_writes_that_are_read_stay(function) -> None:
    run = captured(function, x())
    written = [n for n in ops(run.specialized()[0]) if n in ("add_", "zero_")]
    _, graph = rewrite(run, dead)
    assert [n for n in ops(graph) if n in ("add_", "zero_")] == written != []


def built(*calls: tuple) -> tuple[fx.Graph, list[fx.Node]]:
    """A graph by hand of calls (op, args), an int among the args being the number of an earlier value."""
    graph = fx.Graph()
    nodes = [graph.placeholder("e0")]
    nodes[0].meta["spec"] = Spec((3, 4), (4, 1), torch.float32, 0)
    for k, (op, args, storage) in enumerate(calls):
        nodes.append(graph.call_function(op, tuple(nodes[a] if isinstance(a, int) else a for a in args)))
        nodes[-1].meta.update(spec=Spec((3, 4), (4, 1), torch.float32, storage), instruction=k)
    return graph, nodes


def test_writes_to_what_came_from_outside_stay() -> None:
    graph, nodes = built(
        (aten.view.default, (0, [3, 4]), 0), (aten.add_.Tensor, (1, 1.0), 0), (aten.neg.default, (0,), 1)
    )  # fmt: skip
    graph.output([nodes[3]])
    assert dead(graph) == 0 and copies(graph) == 0 and duplicates(graph) == 0


def test_random_numbers_are_drawn_even_if_unread() -> None:
    draws = (aten.rand_like.default, aten.bernoulli.default, aten.rand_like.default, aten.exp.default)
    graph, _ = built(*((op, (0,), k + 1) for k, op in enumerate(draws)))
    graph.output([])
    assert dead(graph) == 1 and ops(graph) == ["rand_like", "bernoulli", "rand_like"]
    assert duplicates(graph) == 0


def test_running_statistics_are_written_to() -> None:
    graph = fx.Graph()
    names = ("x", "mean", "var")
    x, mean, var = (graph.placeholder(n) for n in names)
    for k, (n, shape) in enumerate(zip((x, mean, var), ((2, 3, 4), (3,), (3,)), strict=True)):
        n.meta["spec"] = Spec(shape, (12, 4, 1)[-len(shape) :], torch.float32, k)
    for training in (True, False):
        arguments = (x, None, None, mean, var, training, 0.1, 1e-5, False)
        call = graph.call_function(aten.batch_norm.default, arguments)
        call.meta["spec"] = Spec((2, 3, 4), (12, 4, 1), torch.float32, 3 + training)
    graph.output([])
    assert dead(graph) == 1
    assert [n.args[5] for n in graph.nodes if n.op == "call_function"] == [True]
