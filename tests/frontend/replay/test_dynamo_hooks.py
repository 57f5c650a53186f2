"""The private hooks of PyTorch that replay stands on, on the version that is installed."""

from __future__ import annotations

import torch
from torch import nn

from genie.frontend.replay import dynamo
from genie.frontend.tensor import LazyTensor


def test_dynamo_takes_lazy_tensors_as_plain_ones() -> None:
    dynamo.install()
    from torch._dynamo.variables import builder

    for trace_numpy in (True, False):
        table = builder.VariableBuilder._type_dispatch_impl(trace_numpy)
        assert table[LazyTensor] is builder.VariableBuilder.wrap_tensor
        assert table[torch.Tensor] is builder.VariableBuilder.wrap_tensor
    assert builder.infer_subclass_type(torch.ones(1)) is None


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
