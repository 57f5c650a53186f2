"""`Module.to`, `.cpu()` and friends between device ``genie`` and another one.

On other devices PyTorch moves a parameter by exchanging the data inside it, so that tied weights
stay tied and an optimizer keeps its parameters. Between ``genie`` and the CPU it cannot, and would
put a new Parameter in each place. Swapping the two tensors keeps the Parameter object; PyTorch's
own switch for that (`torch.__future__.set_swap_module_params_on_conversion`) is for the process, and
changes what `load_state_dict` does to models that have nothing to do with Genie: so the swap is
made here, for the parameters that cross, by the function that `Module._apply` hands to each of them.

What moves, or loads its state, is also where a session learns the names of its weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.nn.parameter import is_lazy

from genie.errors import ParameterInUseError
from genie.frontend import names
from genie.wire import ahead

_pytorch_apply = nn.Module._apply
_pytorch_load_state_dict = nn.Module.load_state_dict


def _crosses(old: Tensor, new: Tensor) -> bool:
    return old.device.type != new.device.type and "genie" in (old.device.type, new.device.type)


class _Move:
    """What `Module._apply` hands to each tensor of a module and, through its children, of all below it."""

    def __init__(self, root: nn.Module, fn: Callable[[Tensor], Tensor]) -> None:
        self._root, self._fn = root, fn
        self._checked = False

    def __call__(self, t: Tensor) -> Tensor:
        moved = self._fn(t)
        if isinstance(t, nn.Parameter) and not is_lazy(t) and _crosses(t, moved):
            if not self._checked:
                self._check()
                if moved.device.type == "genie" and moved.dtype == t.dtype:
                    ahead.announce(p.detach() for p in _in_order(self._root) if p is not t)
            self._swap(t, moved)
            return t.detach()  # what PyTorch then puts into the parameter is what is there already
        return moved

    def _check(self) -> None:
        """Before anything has moved. A use count of 2 may be a gradient's node: that one is told below."""
        for name, p in self._root.named_parameters():
            if p._use_count() > 2:  # type: ignore[attr-defined]
                raise ParameterInUseError(_held(f"{type(self._root).__name__}.{name}"))
        self._checked = True

    def _swap(self, parameter: nn.Parameter, moved: Tensor) -> None:
        grad, parameter.grad = parameter.grad, None
        moved_grad = None if grad is None else self._fn(grad)
        _exchange(parameter, nn.Parameter(moved, parameter.requires_grad))
        if grad is not None and moved_grad is not None:
            parameter.grad = moved_grad.requires_grad_(grad.requires_grad)


def _in_order(module: nn.Module) -> Iterator[nn.Parameter]:
    """Parameters as `Module._apply` comes to them: those of submodules first."""
    for child in module.children():
        yield from _in_order(child)
    for p in module._parameters.values():
        if p is not None and not is_lazy(p):
            yield p


def _exchange(a: Tensor, b: Tensor) -> None:
    """`torch.utils.swap_tensors`, but weak references to a parameter that moves stay with it: the guards
    of `torch.compile` hold some, and look at the device themselves."""
    if a._use_count() == 2 and a.is_leaf and a.requires_grad:  # type: ignore[attr-defined]
        get_gradient_edge(a).node.register_prehook(_refuse_gradient)
    a.__class__, b.__class__ = b.__class__, a.__class__
    a.__dict__, b.__dict__ = b.__dict__, a.__dict__
    torch._C._swap_tensor_impl(a, b)


def _refuse_gradient(gradients: object) -> None:
    raise ParameterInUseError(
        "a parameter has moved to or from device 'genie' since this forward ran: run backward() before you "
        "move a model, or run forward again"
    )


def _held(name: str) -> str:
    return (
        f"{name} cannot move to or from device 'genie' while something else holds it: a pending backward of "
        "an output that is still alive, or a view. Run backward(), or delete those (`del loss, outputs`), "
        "before you move the model"
    )


def _apply(self: nn.Module, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    if isinstance(fn, _Move):
        return _pytorch_apply(self, fn, recurse)
    try:
        moved = _pytorch_apply(self, _Move(self, fn), recurse)
    finally:
        ahead.forget()
    names.remember(self)
    return moved


@wraps(_pytorch_load_state_dict)
def _load_state_dict(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    loaded = _pytorch_load_state_dict(self, *args, **kwargs)
    names.remember(self)
    return loaded


def register() -> None:
    """Idempotent."""
    nn.Module._apply = _apply  # type: ignore[method-assign]
    nn.Module.load_state_dict = _load_state_dict  # type: ignore[method-assign]
