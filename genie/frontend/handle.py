"""Names of remote values, and the host-known copies ("shadows") of small ones."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from genie.frontend.recorder import Recorder

#: gid of an ``empty`` that nothing has used yet: it is recorded at its first use, or never
UNRECORDED = -(1 << 62)


class Shadow:
    """A small value that the host knows, kept beside the remote one.

    ``tensor`` is a CPU tensor with the same contents; shadows of views are views of shadows, and
    ``alive`` (a one-element list) is shared by all aliases: a write by unknown data kills them all.
    Those made by ops compute it when they are first asked (`shadows.Deferred`): most never are.
    """

    __slots__ = ("__weakref__", "alive", "tensor")

    depth = 0  # how many deferred shadows have to be computed before this one

    def __init__(self, tensor: Tensor, alive: list[bool]) -> None:
        self.tensor, self.alive = tensor, alive


class Value:
    """Names one remote value.

    ``gid`` >= 0 numbers values made by programs, in program order; < 0 those uploaded. A value of the
    program that is being recorded is a plain `Value`: whether it is still held is looked up when the
    program ends, which costs less than a finalizer. What is held then becomes a `Handle`.
    """

    __slots__ = ("__weakref__", "empty", "gid", "rec", "root", "shadow")

    rec: Recorder
    gid: int
    shadow: Shadow | None
    #: shared by a value and its views: [autograd saw one of them, one was made without autograd]
    root: list[bool] | None
    #: the (func, args, kwargs) of an unrecorded ``empty``
    empty: Any


class Handle(Value):
    """A value that outlives its program: when the last tensor that holds it dies, it is released."""

    __slots__ = ()

    def __init__(self, rec: Recorder, gid: int) -> None:
        self.rec = rec
        self.gid = gid
        self.shadow = None
        self.root = None
        self.empty = None

    def __del__(self) -> None:
        if self.gid != UNRECORDED:
            self.rec.dead.append(self.gid)
