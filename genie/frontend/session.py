"""Sessions: which executor the device ``genie`` stands for, now."""

from __future__ import annotations

import torch

from genie.errors import SessionClosedError
from genie.frontend.device import register
from genie.frontend.program import Executor
from genie.frontend.recorder import Recorder
from genie.frontend.tensor import LazyTensor

_stack: list[Session] = []


class Session:
    """Everything made on device ``genie`` between ``with session:`` belongs to this session.

    The session on top of the stack receives new tensors; ops follow the tensors they are given.
    """

    def __init__(self, executor: Executor) -> None:
        register()
        self.executor = executor
        self.recorder = Recorder(executor)

    def activate(self) -> Session:
        """Makes this the session that ``device="genie"`` stands for, until `close`."""
        _stack.append(self)
        return self

    def deactivate(self) -> None:
        if self in _stack:
            _stack.remove(self)

    def synchronize(self) -> None:
        """Waits until everything recorded so far has run. Raises what failed."""
        probe = torch.zeros((), dtype=torch.int64, device="genie") if current() is self else None
        if isinstance(probe, LazyTensor):
            self.recorder.flush(fetch=[self.recorder.gid_of(probe)])
        else:
            self.recorder.flush()

    def close(self, reason: str = "closed") -> None:
        """Frees everything on the server; the session's tensors cannot be used any more."""
        self.deactivate()
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
