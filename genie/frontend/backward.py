"""Errors in the middle of a backward pass, reported by `backward()` instead of ending the process.

Autograd calls an op of a backward formula from C++, on a thread without a Python frame. A Python
error that leaves ``__torch_dispatch__`` there stays pending in the interpreter while C++ unwinds,
and the unwinding asks device genie's guard (Python, `torch._C._acc`) for its type, which must not
fail: `std::terminate`. So no error leaves: a stand-in takes the place of the result, whatever uses
it fails with the same error, and autograd is given a callback that raises it from `backward()`.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch.autograd import Variable
from torch.autograd.graph import _engine_run_backward

from genie.errors import GenieError
from genie.frontend.specs import meta_tensor, spec_of
from genie.frontend.tensor import LazyTensor, wrap

_current_task = torch._C._current_graph_task_id


class FailedBackward:
    """In the place of a recorder: whatever is asked of the results of a failed backward raises its error."""

    def __init__(self, error: Exception) -> None:
        self.error = error
        self.dead: list[int] = []
        self.closed = f"a backward pass failed: {error}"

    def record(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        raise self.error

    def fetch(self, *args: Any) -> Any:
        raise GenieError(
            f"this value comes from a backward pass that failed: {self.error}. Set the gradients to None "
            "(optimizer.zero_grad()) and run forward and backward again"
        ) from self.error


class _NoValue:
    """The handle of a stand-in."""

    __slots__ = ("__weakref__", "empty", "gid", "rec", "root", "shadow")

    def __init__(self, rec: FailedBackward) -> None:
        self.rec, self.gid = rec, -1
        self.shadow = self.root = self.empty = None


def caller_is_autograd() -> bool:
    """True where C++ code of a backward pass called the function that asks."""
    if _current_task() == -1:
        return False
    frame = sys._getframe(1)
    return frame.f_back is None or frame.f_back.f_code is _engine_run_backward.__code__


def stand_in(func: Any, args: tuple, kwargs: dict[str, Any], error: Exception) -> Any:
    """What the op would have returned, without values. Raises ``error`` where even shapes are unknown."""
    failed = _failure_among(args)
    if failed is None:
        failed = FailedBackward(error)

        def report() -> None:
            raise error

        Variable._execution_engine.queue_callback(report)
    if func._schema.is_mutable:
        return args[0]  # left as it was
    made = func(*_on_meta(args), **{k: _on_meta(v) for k, v in kwargs.items()})
    if isinstance(made, torch.Tensor):
        return _without_value(made, failed)
    return type(made)(_without_value(t, failed) for t in made)


def _failure_among(args: Any) -> FailedBackward | None:
    for a in args:
        if isinstance(a, LazyTensor) and isinstance(a._h.rec, FailedBackward):
            return a._h.rec
        if isinstance(a, (list, tuple)):
            found = _failure_among(a)
            if found is not None:
                return found
    return None


def _on_meta(value: Any) -> Any:
    if isinstance(value, LazyTensor):
        return meta_tensor(value._spec)
    if isinstance(value, torch.Tensor):
        return value.to("meta")
    if isinstance(value, (list, tuple)):
        return [_on_meta(v) for v in value]
    return torch.device("meta") if isinstance(value, torch.device) else value


def _without_value(made: Any, failed: FailedBackward) -> Any:
    return wrap(spec_of(made), _NoValue(failed)) if isinstance(made, torch.Tensor) else made  # type: ignore[arg-type]
