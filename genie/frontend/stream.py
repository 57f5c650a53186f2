"""A session's programs on their way to an executor: what is recorded is handed over in order.

`Recorder` appends instructions to the current program; this half finishes it, executes it, reads
values back and tells which Python line an error came from.
"""

from __future__ import annotations

import threading
import time
import weakref
from array import array
from collections import deque
from sys import getrefcount
from typing import Any, Protocol

import torch
from torch import Tensor

from genie.errors import RemoteError, SessionClosedError
from genie.frontend.callsite import Sites
from genie.frontend.entries import Entry
from genie.frontend.handle import Handle, Shadow, Value
from genie.frontend.names import WeightNames
from genie.frontend.program import Executor, Outcome, Program
from genie.frontend.tensor import LazyTensor
from genie.profiling import spans

#: host tensors up to this many bytes keep a shadow
SHADOW_BYTES = 8192
#: what `getrefcount` says of a value that only the list of made values holds
_UNHELD = max(map(getrefcount, [Value()]))


class Recorded(Protocol):
    """Where the instructions of one program were recorded."""

    def describe(self, instruction: int) -> str | None:
        """``file:line in function: source text``, or None where no Python line is known."""


class ProgramStream:
    """The current program of a session, and the ways out of it. Its lock makes it thread-safe.

    `Recorder` is the half that recording needs: it names values and appends instructions.
    """

    def __init__(self, executor: Executor) -> None:
        self.executor = executor
        self.lock = threading.RLock()
        self.closed: str | None = None
        #: whether modules that are called again run compiled (`genie.frontend.replay.automatic`)
        self.replay = False
        self.weight_names = WeightNames()
        self.dead: list[int] = []
        #: shadows that a write to another would change, if they are not computed before it
        self.deferred: weakref.WeakSet[Shadow] = weakref.WeakSet()
        self.programs = 0
        self.syncs = 0
        self.replays = 0
        self.ops = 0
        self.capture_s = 0.0
        self._uploads = 0
        self._chunk = executor.chunk
        #: recent programs: (number of the first instruction, of the one after the last, their sites)
        self._recent: deque[tuple[int, int, Recorded]] = deque(maxlen=64)
        self._begin(0)

    def _begin(self, base: int) -> None:
        self._code: list[int] = []
        self._literals: list[int] = []
        self._floats: list[float] = []
        self._entries: list[Entry] = []
        self._fresh: list[int] = []
        self._sites: list[Any] = []
        self._ext: dict[int, int] = {}
        self._inputs: list[tuple[int, Tensor]] = []
        self._base = base
        self._made: list[Value] = []
        self._started = 0.0

    # -- values from and to the host -------------------------------------------------------------

    def bind_host(self, tensor: Tensor, is_parameter: bool) -> Handle:
        """A handle for the present content of a dense CPU tensor."""
        with self.lock:
            self._uploads += 1
            handle = self.new_handle(-self._uploads)
            if tensor.nbytes <= self.executor.inline_bytes and not is_parameter:
                copy = tensor.detach().clone(memory_format=torch.preserve_format)
                self._inputs.append((handle.gid, copy))
                if tensor.nbytes <= SHADOW_BYTES:
                    # The shadow may be written to by later ops; the copy that travels must not.
                    handle.shadow = Shadow(copy.clone(), [True])
            else:
                self.executor.upload(handle.gid, tensor, is_parameter)
            return handle

    def fetch(self, tensors: list[LazyTensor], cause: str) -> list[Tensor]:
        """The tensors' values on the CPU: one round trip, or none where the host knows them.

        ``cause``: the call that reads them, as it is named in a profile.
        """
        with self.lock:
            shadows_ = [t._h.shadow for t in tensors]
            if all(s is not None and s.alive[0] for s in shadows_):
                return [s.tensor.clone() for s in shadows_]  # type: ignore[union-attr]
            gids = [self.gid_of(t) for t in tensors]
            self.syncs += 1
            if spans.active is None:
                return self.flush(fetch=gids).fetched
            with spans.span(cause):
                return self.flush(fetch=gids, cause=cause).fetched

    def flush(
        self, fetch: list[int] | None = None, describe: list[int] | None = None, cause: str = ""
    ) -> Outcome:
        """Sends what is recorded. Raises the server's error, naming the Python line it came from."""
        with self.lock:
            if self.closed:
                raise SessionClosedError(f"this session has ended ({self.closed}): open a new one")
            if not (self._entries or fetch or describe or self._inputs or self.dead):
                return Outcome()
            program, sites = self._finish(), self._recent[-1][2]
            if spans.active is not None:
                program.trace = spans.active.captured(self, program, sites, cause)
            try:
                outcome = self.executor.execute(program, fetch or [], describe or [])
            except RemoteError as exc:
                for i in program.fresh:
                    program.entries[i].checked = False  # whether the prediction is true is still unknown
                self._add_site(exc)
                raise
            for r in outcome.relayouts:
                program.entries[r.instruction].correct(r.output, r.stride)
            return outcome

    def submit(self, program: Program, sites: Recorded) -> Outcome:
        """Hands over a program that was recorded before, after all that is recorded now.

        Fills in what depends on the session (``base``, ``first``, inputs and releases). The caller holds
        the lock. Raises as `flush`.
        """
        if self._entries or self.closed:
            self.flush()
        program.base, program.first = self._base, self.ops
        program.weight_names = self.weight_names
        program.inputs = self._inputs
        program.release, self.dead = self.dead, []
        self._recent.append((self.ops, self.ops + len(program.entries), sites))
        self.programs += 1
        self.replays += 1
        self.ops += len(program.entries)
        self._begin(program.base + program.n_slots)
        if spans.active is not None:
            program.trace = spans.active.captured(self, program, sites, "replay")
        try:
            return self.executor.execute(program, [], [])
        except RemoteError as exc:
            self._add_site(exc)
            raise

    def _finish(self) -> Program:
        made, base, ended = self._made, self._base, time.perf_counter()
        dead, self.dead = self.dead, []
        program = Program(
            key=(b"", b""),
            n_ext=len(self._ext),
            n_slots=len(made),
            literals=self._literals,
            floats=self._floats,
            ext=list(self._ext),
            base=base,
            inputs=self._inputs,
            release=dead,
            entries=self._entries,
            fresh=self._fresh,
            first=self.ops,
            capture_s=ended - self._started if self._entries else 0.0,
            started=self._started,
            weight_names=self.weight_names,
        )
        code = array("i", self._code).tobytes()
        self._recent.append((self.ops, self.ops + len(self._entries), Sites(self._sites)))
        self.programs += 1 if self._entries else 0
        self.ops += len(self._entries)
        self.capture_s += program.capture_s
        self._begin(base + len(made))
        kept = [i for i, held in enumerate(map(getrefcount, made)) if held > _UNHELD]
        for i in kept:
            made[i].__class__ = Handle
        program.key = (code, array("i", kept).tobytes())
        return program

    def _add_site(self, exc: RemoteError) -> None:
        """Tells in the error which Python line recorded the instruction that failed, if it is recent."""
        number = getattr(exc, "instruction", -1)
        for first, end, sites in self._recent:
            site = sites.describe(number - first) if first <= number < end else None
            if site is not None:
                exc.args = (f"{exc.args[0]}\n  recorded at {site}", *exc.args[1:])

    @property
    def recorded(self) -> int:
        """Instructions recorded since the session began, handed over or not."""
        return self.ops + len(self._entries)

    def gid_of(self, t: LazyTensor) -> int:
        raise NotImplementedError

    def new_handle(self, gid: int) -> Handle:
        raise NotImplementedError

    def close(self, reason: str) -> None:
        """Ends the session: later use of its tensors raises SessionClosedError."""
        with self.lock:
            if self.closed is None:
                self.closed = reason
                self.executor.close()
