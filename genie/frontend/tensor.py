"""`LazyTensor`: what a PyTorch program holds instead of data when its device is ``genie``."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from genie.errors import UnsupportedOpError
from genie.frontend.handle import Value
from genie.frontend.specs import Spec

_EMPTY: dict[str, Any] = {}
_thread = threading.local()


@contextmanager
def without_contents() -> Iterator[None]:
    """In here a tensor's ``repr`` tells its geometry alone: its values would have to be fetched."""
    before = getattr(_thread, "without_contents", False)
    _thread.without_contents = True
    try:
        yield
    finally:
        _thread.without_contents = before


class LazyTensor(torch.Tensor):
    """A tensor on device ``genie``: its geometry is here, its data is wherever the session runs.

    ``_h`` names the value, ``_spec`` is its geometry. Detached copies share the handle.
    """

    _h: Value
    _spec: Spec

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple = (), kwargs: Any = None
    ) -> Any:
        try:
            handler = func._genie_handler
        except AttributeError:
            from genie.frontend.dispatch import choose_handler

            handler = choose_handler(func)
        try:
            return handler(func, args, _EMPTY if kwargs is None else kwargs)
        except Exception as exc:
            from genie.frontend import backward

            if not backward.caller_is_autograd():
                raise
            return backward.stand_in(func, args, kwargs or _EMPTY, exc)

    @property
    def data(self) -> torch.Tensor:
        return torch.Tensor.data.__get__(self)  # type: ignore[attr-defined] # not detach(): own version counter

    @data.setter
    def data(self, other: torch.Tensor) -> None:
        if not isinstance(other, LazyTensor):
            raise UnsupportedOpError(
                "tensor.data cannot change the device from 'genie' in place: use module.to() or tensor.to()"
            )
        torch.Tensor.data.__set__(self, other.detach())  # type: ignore[attr-defined]
        self._h, self._spec = other._h, other._spec

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        if getattr(_thread, "without_contents", False):
            return f"tensor(..., device='genie:0', size={tuple(self.shape)}, dtype={self.dtype})"
        text = repr(self.detach().cpu())
        head, _, tail = text.rpartition(")")
        extra = ", device='genie:0'" + (", requires_grad=True" if self.requires_grad and self.is_leaf else "")
        if self.grad_fn is not None:
            extra += f", grad_fn=<{type(self.grad_fn).__name__}>"
        return f"{head}{extra}){tail}"

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        if id(self) in memo:
            return memo[id(self)]
        if not self.is_leaf:
            raise RuntimeError("only leaf tensors can be deep-copied: use .detach() or .clone() first")
        with torch.no_grad():
            new = self.detach().clone(memory_format=torch.preserve_format)
        if isinstance(self, torch.nn.Parameter):
            new = torch.nn.Parameter(new, self.requires_grad)
        else:
            new.requires_grad_(self.requires_grad)
        if self.grad is not None:
            new.grad = self.grad.__deepcopy__(memo)
        memo[id(self)] = new
        return new

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise UnsupportedOpError(
            "a tensor on device 'genie' cannot be pickled (its data is on a server): "
            "save model.cpu() or tensor.cpu()"
        )

    def tolist(self) -> Any:
        return self.detach().cpu().tolist()

    def numpy(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("can't convert a tensor on device 'genie' to numpy: use tensor.cpu() first")

    def __dlpack__(self, *args: Any, **kwargs: Any) -> Any:
        raise BufferError("a tensor on device 'genie' has no memory to share here: use tensor.cpu() first")

    def data_ptr(self) -> int:
        raise UnsupportedOpError("a tensor on device 'genie' has no address here: its data is on a server")


#: makes a wrapper from `Spec.wrapper`
make = partial(torch.Tensor._make_wrapper_subclass, LazyTensor)
_DEVICE: list[torch.device] = []


def wrap(s: Spec, handle: Value) -> LazyTensor:
    """A lazy tensor of geometry ``s`` for the value that ``handle`` names."""
    t = make(*s.wrapper)
    t._h = handle
    t._spec = s
    return t


def wrap_view(s: Spec, handle: Value, base: torch.Tensor) -> LazyTensor:
    """As `wrap`, for a view of ``base``: a view of a normal tensor is normal under inference_mode too."""
    if torch.is_inference_mode_enabled() and not base.is_inference():
        with torch.inference_mode(False):
            return wrap(s, handle)
    return wrap(s, handle)
