"""Replay without being asked for: what modules do on device ``genie`` is compiled once they are called again.

While a session with replay is open, every outermost call of a module passes through here. The first
call of a kind is captured lazily; from the next one on the module runs compiled (backend ``genie``).
The kind of a call says which arguments there are, with their types and ranks, and which of their sizes
are 1: a prompt and a single token are two kinds, tokens at growing positions are one.
"""

from __future__ import annotations

import logging
import threading
import types
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as modules

from genie.errors import StaleGraphError
from genie.frontend import names
from genie.frontend.recorder import Recorder
from genie.frontend.tensor import LazyTensor

log = logging.getLogger("genie.replay")

#: graphs of one module after which, if its calls keep asking for new ones, it stays lazy
MAX_GRAPHS = 12
#: ops of a call below which capturing them costs less than a compiled graph's guards
LEAST_OPS = 16
#: calls per graph below which compiling does not pay
_CALLS_PER_GRAPH = 4

#: how many tensors of a call's arguments are looked at, and how deep they may lie
_MOST_TENSORS, _DEEPEST = 4096, 5

_thread = threading.local()
_modules: weakref.WeakKeyDictionary[nn.Module, ModuleReplay] = weakref.WeakKeyDictionary()
_users = 0
_lock = threading.Lock()


class ModuleReplay:
    """How one module's outermost calls run."""

    def __init__(self, module: nn.Module) -> None:
        self.name = type(module).__name__
        self.graphs = 0
        self.calls = 0
        self.lazy: str = ""  # why it is not compiled any more
        #: by kind the sizes in its first call; None where that had too few ops for compiling to pay
        self._seen: dict[tuple, dict[str, tuple[int, ...]] | None] = {}
        self._compiled_kinds: set[tuple] = set()
        self._compiled: Callable[..., Any] | None = None

    def run(self, module: nn.Module, recorder: Recorder, args: tuple, kwargs: dict[str, Any]) -> Any:
        if self.lazy:
            return module._call_impl(*args, **kwargs)
        kind = _kind(module, args, kwargs)
        if kind in self._compiled_kinds:
            return self._call(module, recorder, args, kwargs)
        if kind not in self._seen:
            return self._first(module, recorder, kind, args, kwargs)
        before = self._seen[kind]
        if before is None:
            return module._call_impl(*args, **kwargs)
        from genie.frontend.replay.dynamo import changing_sizes

        self._compiled_kinds.add(kind)
        # Sizes that differ already will go on differing.
        with changing_sizes(_changed(before, sizes_of(args, kwargs))):
            return self._call(module, recorder, args, kwargs)

    def _first(
        self, module: nn.Module, recorder: Recorder, kind: tuple, args: tuple, kwargs: dict[str, Any]
    ) -> Any:
        before, sizes = recorder.recorded, sizes_of(args, kwargs)
        result = module._call_impl(*args, **kwargs)
        self._seen[kind] = sizes if recorder.recorded - before >= LEAST_OPS else None
        return result

    def _call(self, module: nn.Module, recorder: Recorder, args: tuple, kwargs: dict[str, Any]) -> Any:
        from genie.frontend.replay.dynamo import automatic_replay

        compiled = self._compiled or self._compile()
        self.calls += 1
        recorded = recorder.recorded
        try:
            with automatic_replay():
                return compiled(module, *args, **kwargs)
        except StaleGraphError:
            if recorder.recorded != recorded:
                raise  # as below
        except torch._dynamo.exc.TorchDynamoException as exc:
            if recorder.recorded != recorded:
                raise  # part of the call has been done: it must not be done twice
            self.lazy = f"Dynamo cannot trace it: {type(exc).__name__}"
            log.warning("%s stays lazy: %s: %s", self.name, type(exc).__name__, str(exc).splitlines()[0])
        return module._call_impl(*args, **kwargs)

    def _compile(self) -> Callable[..., Any]:
        from genie.frontend.replay.backend import backend

        def counted(gm: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
            self._count()
            return backend(gm, inputs)

        # A code object of its own: Dynamo keeps its cache, and its limit, by code object.
        self._compiled = torch.compile(_traceable(_call, self.name), backend=counted)
        return self._compiled

    def _count(self) -> None:
        self.graphs += 1
        if self.graphs > MAX_GRAPHS and self.calls < _CALLS_PER_GRAPH * self.graphs and not self.lazy:
            self.lazy = f"{self.graphs} graphs for {self.calls} calls"
            warnings.warn(
                f"Genie: {self.name} needs new graphs all the time ({self.lazy}), so its calls are captured "
                "lazily from now on. Its control flow or its sizes depend on data; compile the parts that do "
                'not with torch.compile(part, backend="genie"), or leave replay off',
                RuntimeWarning,
                stacklevel=2,
            )


def _traceable(function: Any, name: str) -> Callable[..., Any]:
    """A copy that Dynamo looks into, as it does not into the files of Genie."""
    code = function.__code__.replace(co_name=name, co_filename=f"<replay of {name}>")
    return types.FunctionType(code, function.__globals__)


def _call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return module(*args, **kwargs)


def _kind(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple:
    kind: list[Any] = [module.training, torch.is_grad_enabled(), torch.is_inference_mode_enabled()]
    for name, value in (*enumerate(args), *kwargs.items()):
        if isinstance(value, Tensor):
            kind.append((name, value.dtype, tuple(n == 1 for n in value.shape)))
        elif value is None or isinstance(value, (bool, str)):
            kind.append((name, value))
        else:
            kind.append((name, type(value)))
    return tuple(kind)


def sizes_of(args: tuple, kwargs: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """The shapes of all tensors that a call is given, also inside of lists, dicts and objects (a KV
    cache), by the names that Dynamo gives them."""
    found: dict[str, tuple[int, ...]] = {}
    todo: list[tuple[str, Any, int]] = [("L['args']", list(args), 0), ("L['kwargs']", kwargs, 0)]
    seen: set[int] = set()
    while todo and len(found) < _MOST_TENSORS:
        name, value, depth = todo.pop()
        if isinstance(value, Tensor):
            found[name] = tuple(value.shape)
        elif depth < _DEEPEST and id(value) not in seen and not isinstance(value, nn.Module):
            seen.add(id(value))
            if isinstance(value, (list, tuple)):
                todo += [(f"{name}[{i}]", v, depth + 1) for i, v in enumerate(value)]
            elif isinstance(value, dict):
                todo += [(f"{name}[{k!r}]", v, depth + 1) for k, v in value.items() if isinstance(k, str)]
            elif hasattr(value, "__dict__") and not isinstance(value, type):
                todo += [(f"{name}.{k}", v, depth + 1) for k, v in vars(value).items()]
    return found


def _changed(before: dict[str, tuple[int, ...]], now: dict[str, tuple[int, ...]]) -> list[tuple[str, int]]:
    return [
        (name, dim)
        for name, shape in now.items()
        if len(before.get(name, ())) == len(shape)
        for dim, (old, new) in enumerate(zip(before[name], shape, strict=True))
        if old != new and 1 not in (old, new)
    ]


def _recorder_of(module: nn.Module) -> Recorder | None:
    """The recorder of the module's first parameter or buffer; None when that is elsewhere."""
    for tensors in (module.parameters(), module.buffers()):
        for t in tensors:
            return t._h.rec if isinstance(t, LazyTensor) else None
    return None


def _needs_gradients(module: nn.Module) -> bool:
    return torch.is_grad_enabled() and any(p.requires_grad for p in module.parameters())


def _has_global_hooks() -> bool:
    """Hooks for all modules, which Dynamo neither calls nor guards against."""
    return bool(
        modules._global_forward_pre_hooks
        or modules._global_forward_hooks
        or modules._global_backward_pre_hooks
        or modules._global_backward_hooks
    )


def _outermost(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Stands in for `nn.Module._call_impl`, which calls of inner modules reach at once. Dynamo traces
    this where a module overrides ``__call__``, and no further than the first line."""
    if torch.compiler.is_compiling() or getattr(_thread, "inside", False):
        return self._call_impl(*args, **kwargs)
    recorder = _recorder_of(self)
    if recorder is None or not recorder.replay or _needs_gradients(self) or _has_global_hooks():
        return self._call_impl(*args, **kwargs)
    replay = _modules.get(self)
    if replay is None:
        replay = _modules[self] = ModuleReplay(self)
        names.remember(self)  # it may have been made on the device, and never moved
    _thread.inside = True
    try:
        return replay.run(self, recorder, args, kwargs)
    finally:
        _thread.inside = False


def switch_on() -> None:
    """From now on calls are looked at; once for each session with replay."""
    global _users
    with _lock:
        _users += 1
        # The one private hook: `nn.Module.__call__` tries this attribute first.
        nn.Module._compiled_call_impl = _traceable(_outermost, "module calls")


def switch_off() -> None:
    global _users
    with _lock:
        _users -= 1
        if not _users:
            nn.Module._compiled_call_impl = None


def state_of(module: nn.Module) -> ModuleReplay | None:
    """How a module's calls run; None while it has not been called on a device with replay."""
    return _modules.get(module)
