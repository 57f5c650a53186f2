"""Aliasing, masks, factories, copies and errors on device genie, each against the CPU."""

from __future__ import annotations

import copy

import pytest
import torch

import genie
from genie.errors import GenieError, RemoteOpError, SessionClosedError, UnsupportedOpError
from genie.frontend.session import Session


def both(program) -> None:
    """Runs a program of (device) -> tensors on both devices and compares."""
    expected, got = program("cpu"), program("genie")
    expected, got = (v if isinstance(v, (list, tuple)) else [v] for v in (expected, got))
    for e, g in zip(expected, got, strict=True):
        assert g.device.type == "genie"
        torch.testing.assert_close(g.cpu(), e, rtol=1e-5, atol=1e-6)
        assert g.shape == e.shape and g.dtype == e.dtype


def arange(device: str, n: int = 12) -> torch.Tensor:
    return torch.arange(n, device=device, dtype=torch.float32)


def test_a_view_sees_writes_to_its_base(session: Session) -> None:
    def program(device: str):
        base = arange(device).reshape(3, 4)
        row, transposed = base[1], base.t()
        base.mul_(2)
        row += 100
        transposed[0, 2] = -1
        return base, row, transposed

    both(program)


def test_chained_in_place_ops_and_slices(session: Session) -> None:
    def program(device: str):
        x = arange(device)
        x[2:6] = x[6:10].clone()
        x[x > 8] = 0
        x[torch.tensor([0, 3], device=device)] = 7.0
        x.clamp_(max=6).relu_()
        return x

    both(program)


def test_metadata_in_place(session: Session) -> None:
    def program(device: str):
        x = arange(device).view(1, 3, 4)
        x.squeeze_(0)
        x.t_()
        x.unsqueeze_(1).add_(1)
        return x

    both(program)


def test_masks_and_data_dependent_shapes(session: Session) -> None:
    def program(device: str):
        x = arange(device) % 5
        return (
            x.nonzero(),
            x[x > 2],
            torch.masked_select(x, x < 2),
            torch.unique(x),
            x.nonzero(as_tuple=True)[0],
        )

    both(program)


def test_a_failed_prediction_of_shape_is_an_error_at_once(session: Session) -> None:
    a, b = torch.ones(2, 3, device="genie"), torch.ones(4, 5, device="genie")
    with pytest.raises(RuntimeError, match="reduction dim"):
        a @ b


def test_an_error_on_the_device_names_the_line_that_recorded_it(session: Session) -> None:
    table, bad = torch.ones(3, 4).to("genie"), torch.tensor([99], device="genie")
    bad = bad + 1
    row = torch.nn.functional.embedding(bad, table)  # out of range: only the device can know
    with pytest.raises(RemoteOpError, match=r"(?s)out of range.*test_ops.py.*torch.nn.functional.embedding"):
        row.cpu()
    assert torch.equal((table + 1).cpu(), torch.full((3, 4), 2.0))  # the session lives on
    with pytest.raises(GenieError, match="embedding"):
        (row + 1).cpu()


@pytest.mark.parametrize(
    "make",
    [
        lambda d: torch.tensor([[1, 2], [3, 4]], device=d),
        lambda d: torch.tensor(2.5, device=d),
        lambda d: torch.tensor([True, False], device=d),
        lambda d: torch.tensor([], device=d),
        lambda d: torch.zeros(2, 3, device=d),
        lambda d: torch.ones(2, 3, device=d, dtype=torch.int32),
        lambda d: torch.full((2, 2), 7, device=d),
        lambda d: torch.full((2, 2), 7.5, device=d),
        lambda d: torch.arange(5, device=d),
        lambda d: torch.arange(0, 1, 0.25, device=d),
        lambda d: torch.linspace(0, 1, 5, device=d),
        lambda d: torch.eye(3, device=d),
        lambda d: torch.empty(3, device=d).fill_(4),
        lambda d: torch.zeros_like(torch.ones(3, device=d)),
        lambda d: torch.ones(2, device=d).new_tensor([1, 2, 3]),
        lambda d: torch.ones(2, device=d).new_full((2, 2), 3.0),
        lambda d: torch.tril(torch.ones(3, 3, device=d)),
        lambda d: torch.as_tensor([1.0, 2.0], device=d),
        lambda d: torch.asarray([1.0, 2.0], device=d),
        lambda d: torch.scalar_tensor(3, device=d),
    ],
)
def test_factories(session: Session, make) -> None:
    both(make)


def test_python_numbers_and_tensors_do_not_collide_in_the_cache(session: Session) -> None:
    x, t = torch.full((2,), 5.0, device="genie"), torch.full((2,), 2.0, device="genie")
    for _ in range(2):
        assert (x * 3).tolist() == [15.0, 15.0]
        assert (x * t).tolist() == [10.0, 10.0]
        assert (x * 1).tolist() == [5.0, 5.0] and (x * True).tolist() == [5.0, 5.0]
        assert (x * 1.5).tolist() == [7.5, 7.5] and (x * 2.5).tolist() == [12.5, 12.5]
        i = torch.full((2,), 3, device="genie")
        assert (i * 2).dtype == torch.int64 and (i * 2.0).dtype == torch.float32


def test_copies_in_every_direction(session: Session) -> None:
    host = torch.arange(6.0)
    remote = host.to("genie")
    host.add_(10)  # what was moved stays as it was
    assert remote.tolist() == [0, 1, 2, 3, 4, 5]
    remote.copy_(host)
    target = torch.zeros(6)
    target.copy_(remote)
    assert torch.equal(target, host)
    assert remote.to("genie") is remote
    assert torch.equal(remote.to(torch.float16).cpu(), host.half())
    assert torch.equal(host.to("genie", torch.int64).cpu(), host.long())
    view = torch.zeros(2, 3).to("genie")
    view[0].copy_(host[:3])
    assert torch.equal(view.cpu()[0], host[:3])


def test_repr_deepcopy_equal_bool(session: Session) -> None:
    x = torch.ones(2, 2, device="genie")
    assert repr(x) == "tensor([[1., 1.],\n        [1., 1.]], device='genie:0')"
    y = copy.deepcopy(x)
    y.add_(1)
    assert x.sum().item() == 4 and y.sum().item() == 8
    assert torch.equal(x, torch.ones(2, 2, device="genie")) and not torch.equal(x, y)
    assert bool((x == 1).all()) and not (x == 2).any()
    layer = copy.deepcopy(torch.nn.Linear(2, 2).to("genie"))
    assert isinstance(layer.weight, torch.nn.Parameter) and layer.weight.requires_grad


def test_setting_data_moves_the_value(session: Session) -> None:
    p = torch.nn.Parameter(torch.zeros(3, device="genie"))
    p.data = torch.ones(4, device="genie")
    assert p.shape == (4,) and p.detach().tolist() == [1, 1, 1, 1]
    p.data.mul_(3)
    assert p.detach().tolist() == [3, 3, 3, 3]


def test_shadows_follow_writes(session: Session) -> None:
    x = torch.zeros(4, dtype=torch.int64, device="genie")
    window = x[1:3]
    odd = x.as_strided((2,), (2,), 1)  # a view whose shadow is not kept
    odd.add_(5)
    assert x.tolist() == [0, 5, 0, 5] and window.tolist() == [5, 0]
    window.fill_(9)
    assert x.tolist() == [0, 9, 9, 5]
    data = torch.rand(4, device="genie") * 0
    x.copy_(data.long())
    assert window.tolist() == [0, 0]


def test_values_that_the_host_knows_cost_no_round_trip(session: Session) -> None:
    mask = torch.ones(1, 8, dtype=torch.int64).to("genie")
    done = ~torch.full((2,), True, device="genie")
    before = session.recorder.syncs
    assert bool((mask == 1).all()) and not done.any().item() and mask[:, -1].sum().item() == 1
    assert torch.arange(5, device="genie").max().item() == 4
    assert session.recorder.syncs == before


def test_batch_norm_training_updates_running_statistics(session: Session) -> None:
    def program(device: str):
        layer = torch.nn.BatchNorm1d(3).to(device)
        layer(arange(device).view(4, 3)).sum().backward()
        return layer.running_mean, layer.running_var, layer.num_batches_tracked

    both(program)


def test_inference_mode_views_of_normal_tensors(session: Session) -> None:
    x = arange("genie")
    with torch.inference_mode():
        y = x[2:5].reshape(3, 1) + 1
        z = y.t()
        z.add_(1)
    assert y.tolist() == [[4], [5], [6]]


def test_random_numbers_follow_the_seed(session: Session) -> None:
    torch.manual_seed(7)
    expected = torch.rand(4), torch.randn(3)
    torch.manual_seed(7)
    got = torch.rand(4, device="genie"), torch.randn(3, device="genie")
    for g, e in zip(got, expected, strict=True):
        assert torch.equal(g.cpu(), e)
    host = torch.get_rng_state()
    torch.rand(4, device="genie").cpu()
    assert torch.equal(torch.get_rng_state(), host)  # the host's generator is not ours


@pytest.mark.parametrize(
    ("misuse", "error"),
    [
        (lambda x: x.numpy(), TypeError),
        (lambda x: x.data_ptr(), UnsupportedOpError),
        (lambda x: x.resize_(100), UnsupportedOpError),
        (lambda x: x.to_sparse(), UnsupportedOpError),
        (lambda x: x + torch.ones(4), RuntimeError),
        (lambda x: torch.rand(3, device="genie", generator=torch.Generator()), RuntimeError),
        (lambda x: copy.copy(x).__reduce_ex__(2), UnsupportedOpError),
        (lambda x: x.to_mkldnn(), RuntimeError),
    ],
)
def test_what_does_not_work_says_so(session: Session, misuse, error) -> None:
    with pytest.raises(error):
        misuse(torch.ones(4, device="genie"))


def test_use_after_the_session_ended() -> None:
    with genie.local():
        x = torch.ones(2, device="genie")
    with pytest.raises(SessionClosedError, match="ended"):
        x.cpu()
    with pytest.raises(SessionClosedError, match="no Genie session"):
        torch.ones(2, device="genie")
    with genie.local(), pytest.raises(SessionClosedError, match="ended"):
        torch.ones(2, device="genie") + x


def test_values_are_freed_when_tensors_die() -> None:
    with genie.local() as session:
        x = torch.ones(1000, device="genie")
        for _ in range(5):
            x = x * 1.5
            x.sum().item()
        assert session.executor.store.held_bytes <= 2 * 4000 + 64


def test_a_write_that_a_pending_backward_could_not_notice_is_refused(session: Session) -> None:
    x, w = arange("genie"), torch.ones(12, device="genie", requires_grad=True)
    with torch.no_grad():
        view = x[:3]
    loss = (x * w).sum()
    with pytest.raises(UnsupportedOpError, match="views made under no_grad"):
        view.zero_()
    loss.backward()
    assert w.grad.tolist() == list(range(12))


def test_parameters_may_be_edited_through_views_at_any_time(session: Session) -> None:
    layer = torch.nn.Linear(3, 2).to("genie")
    x = torch.ones(1, 3, device="genie")
    for _ in range(2):
        with torch.no_grad():
            layer.weight[0].zero_()
            layer.weight.view(-1)[4:].fill_(2)
        layer(x).sum().backward()
    assert layer.weight.detach().cpu()[0].tolist() == [0, 0, 0]
    saved = layer.weight * layer.weight
    with torch.no_grad():
        layer.weight[0].fill_(5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        saved.sum().backward()


def test_a_shadow_that_is_read_late_is_that_of_its_own_time(session: Session) -> None:
    one = torch.ones(1, dtype=torch.int64, device="genie")
    x = torch.arange(6, device="genie").view(2, 3)
    before, view = x + one, x[1]
    below = view + view
    x.add_(x)
    after = view + one
    assert before.tolist() == [[1, 2, 3], [4, 5, 6]]
    assert below.tolist() == [6, 8, 10]
    assert view.tolist() == [6, 8, 10]
    assert after.tolist() == [7, 9, 11]
    assert session.recorder.syncs == 0


def test_a_long_chain_of_shadows_is_computed(session: Session) -> None:
    one = torch.ones(1, dtype=torch.int64, device="genie")
    count = torch.zeros(1, dtype=torch.int64, device="genie")
    for _ in range(1500):
        count = count + one
    with torch.inference_mode():
        assert count.item() == 1500
    count.add_(one)
    assert count.item() == 1501
    assert session.recorder.syncs == 0
