"""Private hooks of Dynamo that let it trace tensors on device ``genie``, all in this file.

Dynamo refuses tensor subclasses that it does not know how to take apart. A lazy tensor needs none of
that: to Dynamo it is a plain tensor on a device, whose fake stands for it while tracing.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch._guards import TracingContext
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv

from genie.frontend.tensor import LazyTensor, without_contents

_installed = False
_thread = threading.local()


def install() -> None:
    """Idempotent. Imports Dynamo, which takes about a second the first time in a process."""
    global _installed
    if _installed:
        return
    import torch._dynamo.config as config
    from torch._dynamo import guards, trace_rules
    from torch._dynamo.variables import builder

    for trace_numpy in (True, False):
        # The table is cached per flag, so an entry stays.
        table = builder.VariableBuilder._type_dispatch_impl(trace_numpy)
        table[LazyTensor] = builder.VariableBuilder.wrap_tensor
    infer = builder.infer_subclass_type

    def infer_subclass_type(value: Any) -> Any:
        return None if type(value) is LazyTensor else infer(value)

    builder.infer_subclass_type = infer_subclass_type
    variable_builder: Any = builder.VariableBuilder
    mark_static = variable_builder.mark_static_input

    def mark_static_input(self: Any, value: Tensor, guard: bool) -> None:
        held = getattr(_thread, "replays", False) and isinstance(value, nn.Parameter)
        mark_static(self, value, guard or (held and isinstance(value, LazyTensor)))

    variable_builder.mark_static_input = mark_static_input
    guard_builder: Any = guards.GuardBuilder
    id_match = guard_builder.id_match_unchecked

    @functools.wraps(id_match)
    def id_match_unchecked(self: Any, *args: Any, **kwargs: Any) -> Any:
        # torch before 2.12 writes the ``repr`` of what it guards, all of a model's parameters, into guards.
        with without_contents():
            return id_match(self, *args, **kwargs)

    guard_builder.id_match_unchecked = id_match_unchecked
    mark_as = getattr(builder, "get_automatic_dynamic_shapes_mark_as", None)
    if mark_as is not None:

        def duck_sized() -> Any:
            return DimDynamic.DUCK if getattr(_thread, "replays", False) else mark_as()

        builder.get_automatic_dynamic_shapes_mark_as = duck_sized
        environment: Any = ShapeEnv
        create_symbol = environment.create_symbol

        @functools.wraps(create_symbol)
        def create_duck(
            env: Any, val: Any, source: Any, dynamic_dim: Any = DimDynamic.DUCK,
            constraint_dim: Any = None, *args: Any, **kwargs: Any
        ) -> Any:  # fmt: skip
            # A wish that the size stay unspecialised (it only warns) would make a symbol of its own for it.
            if dynamic_dim is DimDynamic.DUCK and getattr(constraint_dim, "warn_only", False):
                constraint_dim = None
            return create_symbol(env, val, source, dynamic_dim, constraint_dim, *args, **kwargs)

        environment.create_symbol = create_duck
    # What runs below an op is not the user's program: Dynamo must not try to compile it.
    for package in ("frontend", "profiling", "runtime", "semantics", "server", "srg", "wire"):
        trace_rules.add(f"genie.{package}")
    # A hook that is added to a module later must be noticed (PyTorch leaves these guards out).
    config.skip_nnmodule_hook_guards = False
    # Whole module trees whose dictionaries have not changed are passed over: a third of the guards' time.
    if hasattr(config, "use_recursive_dict_tags_for_guards"):
        config.use_recursive_dict_tags_for_guards = True
    _installed = True


@contextmanager
def automatic_replay() -> Iterator[None]:
    """What Dynamo traces in here is a whole module. Dimensions that change and are equal now get one symbol
    and a guard that they stay equal: a model's layers all grow alike, and a symbol for each doubles the time
    to trace. Parameters belong to the graph, with a guard on which object each of them is, instead of being
    arguments: collecting some hundred of them takes a call longer than all else that it does."""
    _thread.replays = True
    try:
        yield
    finally:
        _thread.replays = False


def changing_sizes(sources: Iterable[tuple[str, int]]) -> AbstractContextManager[Any]:
    """While Dynamo traces in here, these dimensions, as (source, dimension), are symbolic from the start.
    Without this (torch before 2.12) it first traces them as constants, and once more when they change."""
    entries = [f"{name}:{dim}" for name, dim in sources if "," not in name and " " not in name]
    config: Any = torch.compiler.config
    if not entries or not hasattr(config, "dynamic_values"):
        return nullcontext()
    return config.patch(dynamic_sources=",".join(entries))


def tracing_fake_mode() -> FakeTensorMode | None:
    """The fake tensors' mode of the trace that is going on in this thread, if one is."""
    context = TracingContext.try_get()
    return context.fake_mode if context is not None else None


def fake_of(tensor: LazyTensor, mode: FakeTensorMode) -> FakeTensor:
    """A fake with the geometry of a lazy tensor that came into being during a trace: ``torch.tensor``
    with ``device="genie"`` makes a real one even there."""
    s = tensor._spec
    with mode:
        fake = torch.empty_strided(s.shape, s.stride, dtype=s.dtype, device=tensor.device)
    assert isinstance(fake, FakeTensor)
    return fake
