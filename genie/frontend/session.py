"""Sessions: which executor the device ``genie`` stands for, now."""

from __future__ import annotations

import torch

from genie.errors import SessionClosedError
from genie.frontend.device import register
from genie.frontend.program import Executor
from genie.frontend.recorder import Recorder
from genie.frontend.replay import automatic
from genie.frontend.tensor import LazyTensor
from genie.profiling import spans

_stack: list[Session] = []


class Session:
    """Everything made on device ``genie`` between ``with session:`` belongs to this session.

    The session on top of the stack receives new tensors; ops follow the tensors they are given.
    ``replay``: modules that are called again run compiled, without being captured anew. Worth it for
    what is called many times: compiling takes seconds.
    """

    def __init__(self, executor: Executor, *, replay: bool = False) -> None:
        register()
        self.executor = executor
        self.recorder = Recorder(executor)
        self.recorder.replay = replay
        spans.sessions.add(self)
        if spans.active is not None:
            spans.active.opened(self)

    def activate(self) -> Session:
        """Makes this the session that ``device="genie"`` stands for, until `close` or until another is."""
        if self not in _stack:
            _stack.append(self)
            if self.recorder.replay:
                automatic.switch_on()
        elif _stack[-1] is not self:
            _stack.remove(self)
            _stack.append(self)
        return self

    def deactivate(self) -> None:
        if self in _stack:
            _stack.remove(self)
            if self.recorder.replay:
                automatic.switch_off()

    def synchronize(self) -> None:
        """Waits until everything recorded so far has run. Raises what failed."""
        probe = torch.zeros((), dtype=torch.int64, device="genie") if current() is self else None
        if isinstance(probe, LazyTensor):
            self.recorder.flush(fetch=[self.recorder.gid_of(probe)], cause="synchronize")
        else:
            self.recorder.flush()

    def close(self, reason: str = "closed") -> None:
        """Frees everything on the server; the session's tensors cannot be used any more."""
        self.deactivate()
        if spans.active is not None:
            spans.active.closed(self)
        self.recorder.close(reason)

    def __enter__(self) -> Session:
        return self.activate()

    def __exit__(self, *exc: object) -> None:
        self.close("its with-block was left")


def current() -> Session:
    """The active session. Raises SessionClosedError where there is none."""
    if not _stack:
        raise SessionClosedError(
            'no Genie session is open: use `with genie.connect("HOST:PORT", token=...):` '
            "or `with genie.local():` around code that uses device 'genie'"
        )
    return _stack[-1]


def seed_current(seed: int) -> None:
    """`torch.manual_seed` for device ``genie``; does nothing while no session is open."""
    if _stack:
        _stack[-1].recorder.seed(seed)


def current_rng_state() -> torch.Tensor:
    """The session's random state as a CPU ByteTensor; without elements while no session is open."""
    return _stack[-1].recorder.rng_state() if _stack else torch.empty(0, dtype=torch.uint8)


def set_current_rng_state(state: torch.Tensor) -> None:
    """What `current_rng_state` returned, back in force; one without elements changes nothing."""
    if state.numel():
        current().recorder.set_rng_state(state)
