"""``out=``, resizing, ``device=`` of like-factories, random state and foreign ops on device genie."""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from genie.errors import RemoteOpError, UnsupportedOpError
from genie.frontend.session import Session


def test_out_without_elements_grows_and_is_what_the_call_returns(session: Session) -> None:
    x, out = torch.arange(6.0, device="genie").view(2, 3), torch.empty(0, device="genie")
    assert torch.add(x, 1, out=out) is out
    assert out.tolist() == [[1, 2, 3], [4, 5, 6]]


def test_out_of_ops_whose_shape_depends_on_values(session: Session) -> None:
    x = torch.tensor([0.0, 3.0, 0.0, 4.0], device="genie") * 1.5
    found, picked = torch.empty(0, dtype=torch.int64, device="genie"), torch.empty(0, device="genie")
    torch.nonzero(x, out=found)
    torch.masked_select(x, x > 0, out=picked)
    assert found.tolist() == [[1], [3]] and picked.tolist() == [4.5, 6]
    assert x.tolist() == [0, 4.5, 0, 6]  # it is out= that was written to


def test_out_of_composite_ops_is_written_to(session: Session) -> None:
    rank = torch.full((), -7, device="genie")
    torch.linalg.matrix_rank(torch.eye(5, device="genie"), out=rank)
    assert rank.item() == 5
    x, out = torch.randn(4, 6), torch.empty(3, 6, dtype=torch.complex64, device="genie")
    torch.fft.ihfftn(x.to("genie"), dim=0, out=out)
    torch.testing.assert_close(out.cpu(), torch.fft.ihfftn(x, dim=0))


def test_the_size_of_arange_follows_its_floats_with_out_too(session: Session) -> None:
    for end, count in ((1.0, 4), (2.0, 8)):
        out = torch.empty(0, device="genie")
        torch.arange(0.0, end, 0.25, out=out)
        assert out.shape == (count,)


def test_an_out_that_would_have_to_grow_in_place_is_refused(session: Session) -> None:
    with pytest.raises(UnsupportedOpError, match=r"add\.out.*final shape"):
        torch.add(torch.ones(4, device="genie"), 1, out=torch.empty(2, device="genie"))
    with pytest.raises(RuntimeError, match="can't be cast"):
        torch.linalg.matrix_rank(
            torch.eye(2, device="genie"), out=torch.empty((), dtype=torch.bool, device="genie")
        )


@pytest.mark.parametrize(
    "write",
    [
        lambda x, host: torch.sum(x, 0, out=host),
        lambda x, host: host.add_(x.sum()),
        lambda x, host: torch.linalg.matrix_rank(x.reshape(2, 2), out=host),
    ],
)
def test_a_result_cannot_be_written_to_the_host(session: Session, write) -> None:
    with pytest.raises(RuntimeError, match="device"):
        write(torch.ones(4, device="genie"), torch.zeros(()))


def test_resizing_to_fewer_elements_keeps_the_storage(session: Session) -> None:
    x = torch.arange(6.0, device="genie")
    view = x[:2]
    x.resize_(2, 2)
    x.mul_(10)
    assert x.tolist() == [[0, 10], [20, 30]] and view.tolist() == [0, 10]
    with pytest.raises(UnsupportedOpError, match="resize"):
        x.resize_(100)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_factories_like_a_tensor_obey_their_device(session: Session, device: str) -> None:
    x = torch.ones(3, 2, device="genie")
    made = [torch.zeros_like(x, device=device), x.new_full((3, 2), 4, device=device)]
    made += [torch.empty_like(x, device=device), torch.rand_like(x, device=device)]
    assert [(t.device.type, t.shape) for t in made] == [(device, (3, 2))] * 4


def test_the_random_state_can_be_saved_and_restored(session: Session) -> None:
    torch.manual_seed(11)
    state = torch.genie.get_rng_state()
    first = torch.rand(5, device="genie").cpu()
    torch.genie.set_rng_state(state)
    assert state.device.type == "cpu" and state.dtype == torch.uint8
    if session.executor.__class__.__name__ != "StatelessExecutor":  # there each server draws its own
        assert torch.equal(torch.rand(5, device="genie").cpu(), first)


def test_what_is_no_random_state_is_refused(session: Session) -> None:
    torch.genie.set_rng_state(torch.zeros(5056, dtype=torch.uint8))
    with pytest.raises(RemoteOpError, match="set_rng_state"):
        torch.rand(2, device="genie").cpu()


def test_checkpointing_draws_the_same_dropout_again() -> None:
    import genie

    with genie.local():
        torch.manual_seed(5)
        x = torch.ones(64, device="genie", requires_grad=True)
        y = checkpoint(torch.nn.functional.dropout, x, 0.5, use_reentrant=False)
        y.sum().backward()
        assert torch.equal(x.grad.cpu(), y.detach().cpu())


@torch.library.custom_op("genie_tests::double_and_shift", mutates_args=())
def double_and_shift(x: torch.Tensor, by: float) -> torch.Tensor:
    return x * 2 + by


def test_an_op_written_in_python_runs_op_by_op(session: Session) -> None:
    out = double_and_shift(torch.ones(2, device="genie"), 0.5)
    assert out.device.type == "genie" and out.tolist() == [2.5, 2.5]
