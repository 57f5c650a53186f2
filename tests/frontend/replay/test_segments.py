"""``torch.compile(backend="genie")``: graphs are lowered once and then sent by number."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn

import genie
from genie.frontend.replay.backend import Replay, backend
from genie.frontend.session import Session


def compiled(fn):  # type: ignore[no-untyped-def]
    return torch.compile(fn, backend="genie")


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.LayerNorm(16), nn.Linear(16, 4)).eval()


def test_a_module_compiled_for_the_backend_gives_what_it_gives_on_the_cpu(local: Session) -> None:
    model = mlp()
    run = compiled(copy.deepcopy(model).to("genie"))
    for n in range(3):
        x = torch.randn(5, 8, generator=torch.Generator().manual_seed(n))
        torch.testing.assert_close(run(x.to("genie")).cpu(), model(x))
    assert local.recorder.replays == 3


def test_replayed_calls_record_no_ops(local: Session) -> None:
    run = compiled(mlp().to("genie"))
    x = torch.randn(5, 8).to("genie")
    run(x)
    local.recorder.flush()
    misses = len(local.recorder.entries)
    out = run(x)
    assert not local.recorder._entries  # nothing waits: the segment went out as it is
    assert len(local.recorder.entries) == misses
    assert out.shape == (5, 4)


def test_growing_sizes_are_one_template(local: Session) -> None:
    def step(cache: torch.Tensor, new: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        cache = torch.cat([cache, new], 1)
        return cache, torch.softmax(cache @ new.transpose(1, 2), 1).view(1, -1)

    run = compiled(step)
    reference, cache = torch.zeros(1, 3, 4), torch.zeros(1, 3, 4, device="genie")
    keys = set()
    for n in range(8):
        new = torch.full((1, 1, 4), n / 8)
        reference, expected = step(reference, new)
        cache, out = run(cache, new.to("genie"))
        torch.testing.assert_close(out.cpu(), expected)
        assert cache.shape == reference.shape
        assert cache.stride() == reference.stride()
        if n > 2:
            keys |= {k for k in local.executor._templates if len(k[0]) > 40}  # type: ignore[attr-defined]
    assert local.recorder.replays == 8
    assert len(keys) <= 2  # the first length, and all others


def test_writes_to_arguments_are_real_and_seen_by_version_and_shadow(local: Session) -> None:
    def bump(x: torch.Tensor, counter: torch.Tensor) -> torch.Tensor:
        x.mul_(2)
        counter.add_(1)
        return x + counter

    run = compiled(bump)
    x, counter = torch.ones(3, device="genie"), torch.zeros((), dtype=torch.int64, device="genie")
    version = x._version
    run(x, counter)
    assert x._version > version
    assert counter.item() == 1  # the host knew it to be 0
    run(x, counter)
    assert (counter.item(), x.tolist()) == (2, [4.0, 4.0, 4.0])


def test_arguments_that_are_only_read_keep_their_version(local: Session) -> None:
    run = compiled(lambda x, weight: x.add_(weight))
    x, weight = torch.zeros(3, device="genie"), torch.ones(3, device="genie")
    versions = x._version, weight._version
    run(x, weight)
    assert x._version > versions[0]
    assert weight._version == versions[1]


def test_statistics_written_in_training_are_seen(local: Session) -> None:
    norm = nn.BatchNorm1d(2)
    remote = copy.deepcopy(norm).to("genie")
    run = compiled(remote)
    for n in range(3):
        x = torch.randn(4, 2, generator=torch.Generator().manual_seed(n))
        torch.testing.assert_close(run(x.to("genie")).cpu(), norm(x))
    torch.testing.assert_close(remote.running_mean.cpu(), norm.running_mean)
    assert remote.num_batches_tracked.item() == 3


def test_outputs_that_alias_an_input_or_each_other_stay_aliases(local: Session) -> None:
    def views(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y = x + 1
        return x[0], y, y[1], x

    run = compiled(views)
    x = torch.zeros(2, 2, device="genie")
    for _ in range(2):
        row, y, y_row, same = run(x)
        assert same is x
        row.fill_(5)
        y_row.fill_(7)
        assert x[0].tolist() == [5.0, 5.0]
        assert y[1].tolist() == [7.0, 7.0]


def test_the_same_tensor_as_two_arguments_is_one_value(local: Session) -> None:
    def write(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        a.add_(1)
        return a + b

    run = compiled(write)
    a, b = torch.zeros(2, device="genie"), torch.zeros(2, device="genie")
    assert run(a, b).tolist() == [1.0, 1.0]
    assert run(a, a).tolist() == [4.0, 4.0]
    assert run(a, a[:]).tolist() == [6.0, 6.0]


def test_views_that_begin_elsewhere_are_replayed_with_the_same_graph(local: Session) -> None:
    run = compiled(lambda row: row * 2)
    x = torch.arange(6.0).view(3, 2).to("genie")
    assert [run(x[i]).tolist() for i in range(3)] == [[0.0, 2.0], [4.0, 6.0], [8.0, 10.0]]
    assert local.recorder.replays == 3


def test_an_argument_that_does_not_look_as_traced_is_refused(local: Session) -> None:
    found: list[Replay] = []

    def kept(gm, inputs):  # type: ignore[no-untyped-def]
        found.append(backend(gm, inputs))
        return found[-1]

    run = torch.compile(lambda x: x / x.shape[0], backend=kept, dynamic=False)
    run(torch.ones(2, device="genie"))
    (graph,) = found
    with pytest.raises(genie.errors.StaleGraphError, match=r"torch._dynamo.reset\(\)"):
        graph(torch.ones(3, device="genie"))  # as if a guard had missed it: the graph divides by 2


def test_a_constant_made_in_the_graph_is_made_anew_by_each_call(local: Session) -> None:
    def scaled(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        weights = torch.tensor([1.0, 2.0], device=x.device)
        weights.add_(x)
        return weights, weights * x

    run = compiled(scaled)
    x = torch.ones(2, device="genie")
    for _ in range(3):
        weights, out = run(x)
        assert (weights.tolist(), out.tolist()) == ([2.0, 3.0], [2.0, 3.0])
    assert local.recorder.replays == 3


@pytest.mark.parametrize(
    ("graph", "expected"),
    [(lambda x: (x.cpu() + 1).to("genie"), [2.0, 3.0]), (lambda x: x[torch.tensor([1, 0])], [2.0, 1.0])],
    ids=["cpu work", "cpu index"],
)
def test_what_touches_the_cpu_is_captured_lazily(local: Session, graph, expected) -> None:  # type: ignore[no-untyped-def]
    run = compiled(graph)
    for _ in range(2):
        assert run(torch.tensor([1.0, 2.0]).to("genie")).tolist() == expected
    assert local.recorder.replays == 0


def test_tensors_of_two_devices_in_one_op_are_refused_as_without_compiling(local: Session) -> None:
    with pytest.raises((RuntimeError, torch._dynamo.exc.TorchRuntimeError), match="device"):
        compiled(lambda x: x + torch.ones(2))(torch.ones(2, device="genie"))


def test_a_graph_that_needs_gradients_is_captured_op_by_op(local: Session) -> None:
    model = nn.Linear(3, 2).to("genie")
    run = compiled(model)
    with torch.enable_grad():
        run(torch.ones(1, 3, device="genie")).sum().backward()
    assert local.recorder.replays == 0
    assert model.weight.grad is not None
    assert model.weight.grad.tolist() == [[1.0] * 3] * 2


def test_random_ops_draw_the_same_numbers_replayed_as_lazily(local: Session) -> None:
    dropout = nn.Dropout(0.5).train()
    run = compiled(dropout)
    x = torch.ones(64, device="genie")
    torch.manual_seed(3)
    lazily = [dropout(x).tolist() for _ in range(3)]
    torch.manual_seed(3)
    replayed = [run(x).tolist() for _ in range(3)]
    assert replayed == lazily
    assert replayed[0] != replayed[1]
    assert local.recorder.replays == 3


def test_an_error_on_the_server_names_the_python_line_that_was_compiled(servers) -> None:  # type: ignore[no-untyped-def]
    from tests.frontend.conftest import TOKEN

    def lookup(table: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.embedding(ids, table) * 2  # out of range for the server alone

    with genie.connect(servers[0].address, TOKEN):
        run = compiled(lookup)
        table = torch.ones(4, 2, device="genie")
        assert run(table, torch.tensor([1], device="genie")).tolist() == [[2.0, 2.0]]
        with pytest.raises(genie.errors.RemoteOpError, match="out of range for the server alone"):
            run(table, torch.tensor([9], device="genie")).cpu()


def test_a_compiled_function_works_in_the_next_session_too() -> None:
    run = compiled(lambda x: torch.nn.functional.gelu(x) * 2)
    expected = (torch.nn.functional.gelu(torch.ones(2)) * 2).tolist()
    for _ in range(2):
        with genie.local() as session:
            assert run(torch.ones(2, device="genie")).tolist() == expected
            assert session.recorder.replays == 1


def test_constants_of_an_ended_session_are_made_anew_in_the_next() -> None:
    run = compiled(lambda x: x + torch.tensor([1.0, 2.0], device="genie"))
    for _ in range(2):
        with genie.local():
            assert run(torch.ones(2, device="genie")).tolist() == [2.0, 3.0]


def test_a_layout_that_the_server_reports_is_taken_over(local: Session) -> None:
    """Masked attention is computed by another kernel than plain attention, with another layout."""

    def attend(q: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        out = torch.nn.functional.scaled_dot_product_attention(q, q, q, attn_mask=mask)
        return out.transpose(1, 2).reshape(q.shape[0], q.shape[2], -1)

    run = compiled(attend)
    for length in (4, 5, 6, 9):
        q = torch.randn(2, 3, length, 8)
        mask = torch.ones(length, length, dtype=torch.bool).tril()
        out = run(q.to("genie"), mask.to("genie"))
        torch.testing.assert_close(out.cpu(), attend(q, mask))
        assert out.is_contiguous()
    assert local.recorder.replays == 4


def test_other_devices_pass_through_the_backend_untouched() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert compiled(lambda x: x + 1)(torch.ones(2)).tolist() == [2.0, 2.0]


def test_the_backend_takes_no_options() -> None:
    with pytest.raises(Exception, match="takes no options"):
        torch.compile(lambda x: x + 1, backend="genie", options={"fast": True})(torch.ones(2))


def test_why_a_graph_is_lazy_can_be_asked(local: Session) -> None:
    found: list[Replay] = []
    from genie.frontend.replay import backend as module

    def kept(gm, inputs):  # type: ignore[no-untyped-def]
        found.append(module.backend(gm, inputs))
        return found[-1]

    torch.compile(lambda x: (x.cpu() + 1).to("genie"), backend=kept)(torch.ones(2, device="genie"))
    assert "copies a tensor to cpu" in found[0].why_lazy
