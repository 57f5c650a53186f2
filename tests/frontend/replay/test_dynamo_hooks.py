"""The private hooks of PyTorch that replay stands on, on the version that is installed."""

from __future__ import annotations

import inspect

import torch
from torch import nn

import genie
from genie.frontend.replay import dynamo
from genie.frontend.tensor import LazyTensor, without_contents


def test_dynamo_takes_lazy_tensors_as_plain_ones() -> None:
    dynamo.install()
    from torch._dynamo.variables import builder

    for trace_numpy in (True, False):
        table = builder.VariableBuilder._type_dispatch_impl(trace_numpy)
        assert table[LazyTensor] is builder.VariableBuilder.wrap_tensor
        assert table[torch.Tensor] is builder.VariableBuilder.wrap_tensor
    assert builder.infer_subclass_type(torch.ones(1)) is None


def test_dynamo_asks_where_parameters_are_marked() -> None:
    from torch._dynamo.variables import builder

    dynamo.install()
    assert builder.VariableBuilder.mark_static_input.__module__ == dynamo.__name__
    assert "ID_MATCH" in inspect.getsource(builder.VariableBuilder.wrap_tensor)  # for marked ones


def test_hooks_of_modules_are_guarded() -> None:
    dynamo.install()
    assert torch._dynamo.config.skip_nnmodule_hook_guards is False


def test_modules_look_at_the_attribute_that_automatic_replay_uses() -> None:
    seen = []

    class Probe(nn.Module):
        def forward(self) -> int:
            return 1

    nn.Module._compiled_call_impl = lambda self: seen.append(self) or self._call_impl()
    try:
        module = Probe()
        assert module() == 1
    finally:
        nn.Module._compiled_call_impl = None
    assert seen == [module]


def test_the_backend_is_found_by_its_name() -> None:
    from torch._dynamo.backends.registry import lookup_backend

    from genie.frontend.replay.backend import backend

    assert lookup_backend("genie") is backend


def test_a_guard_on_a_parameter_does_not_read_it() -> None:
    """Some versions of torch write the ``repr`` of what they guard into the guard."""
    dynamo.install()
    with genie.local() as session, torch.no_grad():
        parameter = nn.Parameter(torch.ones(3, device="genie"))
        syncs = session.recorder.syncs
        with without_contents():
            assert repr(parameter) == "tensor(..., device='genie:0', size=(3,), dtype=torch.float32)"
        assert session.recorder.syncs == syncs
        assert "1., 1., 1." in repr(parameter)
