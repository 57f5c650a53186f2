"""Uses that cannot work say what to do instead; uses that look odd and can work do."""

from __future__ import annotations

import copy
import gc
import io
import pickle

import pytest
import torch
from torch import nn

from genie.errors import (
    GenieError,
    ParameterInUseError,
    RemoteOpError,
    UnsupportedOpError,
)
from genie.frontend.session import Session
from genie.runtime.connection import Connection
from genie.runtime.link import ServerLink
from genie.runtime.remote import ResidentExecutor
from genie.wire.messages import Counters
from tests.frontend.conftest import TOKEN
from tests.frontend.safety.compare import counting, numbers


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(64, 64)  # 16 KiB: small enough to travel inside a program
        self.head = nn.Linear(64, 64)
        self.head.weight = self.embed.weight
        self.register_buffer("scale", torch.full((300, 300), 2.0))  # an upload of its own

    def forward(self, ids):
        return self.head(self.embed(ids)) * self.scale[0, 0]


def held_bytes(session: Session) -> int:
    """What the server keeps for this session."""
    torch.genie.synchronize()
    reply, _ = session.executor.link.connection.request(Counters())
    return reply.held_bytes


# -- unsupported operations --------------------------------------------------------------------------


def test_an_unsupported_op_names_itself_and_the_remedy_and_the_session_goes_on(remote) -> None:
    x = counting("genie", 2, 3)
    with pytest.raises(UnsupportedOpError, match=r"aten\._to_sparse.*CPU"):
        x.to_sparse()
    with pytest.raises(UnsupportedOpError, match=r"aten\.resize_.*final shape"):
        x.resize_(50)
    with pytest.raises(UnsupportedOpError, match=r"set_.*assign"):
        x.set_(counting("genie", 3))
    assert (x + 1).sum().item() == 21


def test_an_op_that_servers_do_not_run_names_the_cpu_as_the_remedy(remote) -> None:
    with torch.library._scoped_library("genie_test", "DEF") as library:
        library.define("double(Tensor x) -> Tensor")
        library.impl("double", lambda x: x * 2, "CPU")
        with pytest.raises(UnsupportedOpError, match=r"genie_test.double.*CPU"):
            torch.ops.genie_test.double(counting("genie", 2))
    assert counting("genie", 3).sum().item() == 3


@torch.no_grad()
def test_an_unsupported_op_inside_a_program(capture) -> None:
    def f(x, sparse: bool):
        y = x * 2
        return y.to_sparse() if sparse else y + 1

    run, x = capture(f), counting("genie", 3)
    for _ in range(3):
        assert run(x, False).tolist() == [1, 3, 5]
        with pytest.raises(UnsupportedOpError, match=r"aten\._to_sparse.*CPU"):
            run(x, True)


@torch.no_grad()
def test_a_program_that_needs_a_new_graph_at_every_call(capture) -> None:
    def f(x, name: str):
        return x + len(name) if name.endswith("0") else x * int(name[1:])

    run, x = capture(f), counting("genie", 3)
    for i in range(torch._dynamo.config.recompile_limit + 2):
        assert run(x, f"n{i}").tolist() == f(x.cpu(), f"n{i}").tolist()


@torch.no_grad()
def test_more_compiled_programs_than_the_server_keeps(servers) -> None:
    def more_ops(k: int):
        def f(x):
            for _ in range(k + 1):
                x = x * 3 - 1
            return x

        return f

    torch._dynamo.reset()
    link = ServerLink(Connection.connect(servers[0].address, TOKEN), max_templates=2)
    with Session(ResidentExecutor(link)) as session:
        programs, x = [more_ops(k) for k in range(5)], counting("genie", 3)
        compiled = [torch.compile(f, backend="genie") for f in programs]
        for _ in range(3):
            for f, run in zip(programs, compiled, strict=True):
                assert run(x).tolist() == f(counting("cpu", 3)).tolist()
        assert session.recorder.replays == 15
        assert link.connection.request(Counters())[0].templates == 2
    torch._dynamo.reset()


def test_numpy_and_addresses(remote) -> None:
    x = counting("genie", 2)
    for misuse in (x.numpy, x.__array__, x.__dlpack__):
        with pytest.raises((TypeError, RuntimeError, BufferError), match="cpu"):
            misuse()
    with pytest.raises(UnsupportedOpError, match="no address here"):
        x.data_ptr()


# -- models that move --------------------------------------------------------------------------------


def test_a_model_moved_back_and_forth_keeps_values_ties_and_memory(remote) -> None:
    torch.manual_seed(0)
    model = Tied()
    weight, ids = model.embed.weight, torch.tensor([1, 5])
    expected, level = model(ids).detach(), None
    for _ in range(4):
        model.to("genie")
        assert model.head.weight is model.embed.weight is weight and weight.device.type == "genie"
        with torch.no_grad():
            torch.testing.assert_close(model(ids.to("genie")).cpu(), expected)
        on_server = held_bytes(remote)
        level = level or on_server
        assert on_server == level >= weight.nbytes
        model.cpu()
        assert model.head.weight is model.embed.weight is weight and weight.device.type == "cpu"
        torch.testing.assert_close(model(ids).detach(), expected)
        gc.collect()
        assert held_bytes(remote) < weight.nbytes
    model.to("genie").to("cpu").to("genie")
    assert isinstance(model.head.weight, nn.Parameter) and model.head.weight.requires_grad


def test_moving_keeps_gradients_and_the_optimizer(remote) -> None:
    torch.manual_seed(0)
    model, twin = nn.Linear(3, 2), nn.Linear(3, 2)
    twin.load_state_dict(model.state_dict())
    x = numbers("cpu", 4, 3)
    steps = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, twin)]
    for device in ("cpu", "genie", "cpu", "genie"):
        for m, d in ((model, device), (twin, "cpu")):
            m.to(d)
            m(x.to(d)).sum().backward()
        for step in steps:
            step.step()
    assert model.weight.grad.device.type == "genie"
    for got, expected in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(got.detach().cpu(), expected.detach())
        torch.testing.assert_close(got.grad.cpu(), expected.grad)


def test_a_model_cannot_move_under_a_pending_backward_and_the_error_says_so(remote) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    loss = model(numbers("cpu", 2, 3)).sum()
    with pytest.raises(ParameterInUseError, match=r"Sequential.1.weight .*pending backward.*backward\(\)"):
        model.to("genie")
    assert all(p.device.type == "cpu" for p in model.parameters())  # all or nothing
    loss.backward()
    del loss
    model.to("genie")
    remote_loss = model(numbers("genie", 2, 3)).sum()
    with pytest.raises(ParameterInUseError, match=r"Sequential.1.weight"):
        model.cpu()
    remote_loss.backward()
    del remote_loss
    model.cpu()
    assert all(p.device.type == "cpu" and p.grad is not None for p in model.parameters())


def test_a_backward_through_a_parameter_that_has_moved_says_so(remote) -> None:
    model = nn.Linear(3, 2)
    loss = model(numbers("cpu", 2, 3)).sum()  # keeps the gradient nodes of its parameters, not their values
    model.to("genie")
    with pytest.raises(ParameterInUseError, match="has moved"):
        loss.backward()
    model(numbers("genie", 2, 3)).sum().backward()


def test_a_model_that_ran_compiled_moves_and_runs_again(capture) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(3, 3), nn.Tanh()), numbers("cpu", 2, 3)
    with torch.no_grad():
        expected = model(x)
        for _ in range(2):
            run = capture(model.to("genie"))
            for _ in range(3):
                torch.testing.assert_close(run(x.to("genie")).cpu(), expected)
            torch.testing.assert_close(model.cpu()(x), expected)


def test_a_model_of_the_cpu_is_treated_as_without_genie(remote) -> None:
    model = nn.Linear(2, 2)
    alias, loss = model.weight.detach(), model(numbers("cpu", 1, 2)).sum()
    model.load_state_dict({"weight": torch.ones(2, 2), "bias": torch.zeros(2)})  # in place, as ever
    assert torch.equal(alias, torch.ones(2, 2)) and loss.requires_grad
    model.double()
    assert model.weight.dtype == torch.float64


def test_a_model_made_on_meta_gets_memory_on_the_device(remote) -> None:
    with torch.device("meta"):
        model = nn.Linear(3, 2)
    model.to_empty(device="genie")
    with torch.no_grad():
        model.weight.fill_(1)
        model.bias.zero_()
        assert model(torch.ones(1, 3, device="genie")).tolist() == [[3, 3]]


# -- errors in the middle ----------------------------------------------------------------------------


def test_an_error_on_the_server_inside_backward_is_raised_by_backward(remote) -> None:
    table = torch.ones(4, 3, device="genie", requires_grad=True)
    bad = torch.tensor([2], device="genie") + 50
    row = nn.functional.embedding(bad, table)
    with pytest.raises(RemoteOpError, match="embedding"):
        row.sum().backward()
        table.grad.cpu()
    assert counting("genie", 3).sum().item() == 3


def test_an_error_while_recording_a_backward_formula_is_raised_by_backward(remote, monkeypatch) -> None:
    def refuse(func, args, kwargs):
        raise UnsupportedOpError("tanh_backward is refused here")

    x = torch.ones(3, device="genie", requires_grad=True)
    loss = torch.tanh(x * 2).sum()
    monkeypatch.setattr(torch.ops.aten.tanh_backward.default, "_genie_handler", refuse, raising=False)
    with pytest.raises(UnsupportedOpError, match="refused here"):
        loss.backward()
    assert (x + 1).tolist() == [2, 2, 2]
    if x.grad is not None:  # what was accumulated has no value, and says so
        with pytest.raises(GenieError, match="backward pass that failed"):
            x.grad.cpu()


def test_zeroed_gradients_accumulate_again(remote) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)).to("genie")
    x = numbers("genie", 2, 3)
    model(x).sum().backward()
    once = [p.grad.cpu() for p in model.parameters()]
    model.zero_grad(set_to_none=False)
    model(x).sum().backward()
    for p, expected in zip(model.parameters(), once, strict=True):
        torch.testing.assert_close(p.grad.cpu(), expected)


# -- pickle, copies and files ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "what", ["tensor", "parameter", "model", "compiled model", "state_dict", "optimizer"]
)
@pytest.mark.parametrize("how", ["pickle", "torch.save"])
def test_what_lives_on_the_device_cannot_be_pickled_and_the_error_names_the_cpu(remote, what, how) -> None:
    model = nn.Linear(3, 2).to("genie")
    step = torch.optim.AdamW(model.parameters())
    model(counting("genie", 1, 3)).sum().backward()
    step.step()
    thing = {
        "tensor": counting("genie", 3), "parameter": model.weight, "model": model,
        "compiled model": torch.compile(model, backend="genie"),
        "state_dict": model.state_dict(), "optimizer": step.state_dict(),
    }[what]  # fmt: skip
    with pytest.raises(UnsupportedOpError, match=r"\.cpu\(\)"):
        if how == "pickle":
            pickle.dumps(thing)
        else:
            torch.save(thing, io.BytesIO())


def test_saving_through_the_cpu_and_loading_onto_the_device(remote) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).to("genie")
    file = io.BytesIO()
    torch.save({k: v.cpu() for k, v in model.state_dict().items()}, file)
    file.seek(0)
    with pytest.raises(UnsupportedOpError, match=r"map_location='cpu'.*\.to\('genie'\)"):
        torch.load(file, map_location="genie", weights_only=True)
    file.seek(0)
    loaded = torch.load(file, map_location="cpu", weights_only=True)
    other = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).to("genie")
    other.load_state_dict(loaded)
    for name, value in other.state_dict().items():
        assert torch.equal(value.cpu(), model.state_dict()[name].cpu())


def test_deep_copies_of_tensors_that_are_no_leaves(remote) -> None:
    x = counting("genie", 2).requires_grad_()
    with pytest.raises(RuntimeError, match="only leaf tensors"):
        copy.deepcopy(x * 2)
    twin = copy.deepcopy(x)
    with torch.no_grad():
        twin.add_(5)
    assert twin.requires_grad and x.tolist() == [0, 1] and twin.tolist() == [5, 6]
    shared = [x, x]
    copied = copy.deepcopy(shared)
    assert copied[0] is copied[1] is not x
