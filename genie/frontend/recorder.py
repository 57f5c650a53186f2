"""Records operations on device ``genie`` in program order and hands programs to an executor.

The hot path is `Recorder.record`: build a key, look up its `Entry`, append a few ints, wrap the
outputs. Shape inference, patterns and checks happen once per key, on a miss.
"""

from __future__ import annotations

import threading
import time
from array import array
from collections import deque
from sys import _getframe
from types import CodeType, FrameType
from typing import Any

import torch
from torch import Tensor
from torch import is_grad_enabled as _grad_enabled

from genie.errors import RemoteError, SessionClosedError, UnsupportedOpError
from genie.frontend import shadows
from genie.frontend.callsite import _INTERNAL, describe, is_internal
from genie.frontend.entries import DataDependent, Entry, define, dynamic_entry, make_entry
from genie.frontend.handle import UNRECORDED, Handle, Shadow
from genie.frontend.program import Executor, Outcome, Program
from genie.frontend.specs import Spec, spec
from genie.frontend.tensor import LazyTensor, wrap, wrap_view
from genie.wire.messages import TensorSpec

#: host tensors up to this many bytes keep a shadow
SHADOW_BYTES = 8192

_TRUE, _FALSE, _FLOAT, _KWARGS = object(), object(), object(), object()


def _all_ints(items: list) -> bool:
    for x in items:  # noqa: SIM110 - a generator would cost more than the loop
        if x.__class__ is not int:
            return False
    return True


class HostOperandError(Exception):
    """A CPU tensor is among an op's arguments (`dispatch` lifts it where that is allowed)."""


class Recorder:
    """One per session. Not shared between sessions; its lock makes it safe between threads."""

    def __init__(self, executor: Executor) -> None:
        self.executor = executor
        self.lock = threading.RLock()
        self.entries: dict[tuple, Entry] = {}
        self.closed: str | None = None
        self.scope: tuple[int, bytearray] = (0, bytearray())
        self.dead: list[int] = []
        self.programs = 0
        self.syncs = 0
        self.ops = 0
        self.capture_s = 0.0
        self._uploads = 0
        self._chunk = executor.chunk
        #: where recent instructions were recorded: (number of the first, code objects, their offsets)
        self._recent: deque[tuple[int, list[CodeType | None], list[int]]] = deque(maxlen=64)
        self._begin(0)

    # -- recording -------------------------------------------------------------------------------

    def _begin(self, base: int) -> None:
        self._code: list[int] = []
        self._literals: list[int] = []
        self._floats: list[float] = []
        self._entries: list[Entry] = []
        self._fresh: list[int] = []
        self._codes: list[CodeType | None] = []
        self._offsets: list[int] = []
        self._ext: dict[int, int] = {}
        self._inputs: list[tuple[int, Tensor]] = []
        self._base = base
        self._alive = bytearray()
        self._started = 0.0
        # One atomic store: a handle that dies in between finds either the old scope or the new one.
        self.scope = (base, self._alive)

    def record(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Appends one op; returns what the op returns, as lazy tensors.

        Raises HostOperandError when a CPU tensor is among the arguments; nothing is recorded then.
        """
        with self.lock:
            base = self._base
            key: list[Any] = [id(func)]  # ops are never freed, and hash slowly
            slots: list[int] = []
            floats: list[float] = []
            tensors: list[LazyTensor] = []
            known = True
            for a in args:
                cls = a.__class__
                if cls is LazyTensor:
                    h = a._h
                    gid = h.gid
                    if h.rec is not self or gid == UNRECORDED:
                        gid = self._adopt(h)
                    key.append(a._spec)
                    tensors.append(a)
                    slots.append(gid - base if gid >= base else self._external(gid))
                    if h.shadow is None:
                        known = False
                elif cls is int:
                    key.append(a)
                elif cls is float:
                    key.append(_FLOAT)
                    floats.append(a)
                elif cls is list and _all_ints(a):
                    key.append(tuple(a))
                else:
                    known &= self._argument(a, key.append, slots, floats, tensors)
            if kwargs:
                key.append(_KWARGS)
                for name, a in kwargs.items():
                    key.append(name)
                    known &= self._argument(a, key.append, slots, floats, tensors)
            if floats and func in shadows.SIZED_BY_FLOATS:
                key.extend(map(repr, floats))
            hashed = tuple(key)
            entry = self.entries.get(hashed)
            if entry is None:
                entry = self.entries[hashed] = self._make_entry(func, args, kwargs, tensors)
            if entry.dynamic:
                return self._record_dynamic(func, args, kwargs, entry, slots, floats, tensors)

            if entry.writes:
                _check_roots(func, [tensors[r] for r in entry.results if r.__class__ is int] or tensors)
            entries, alive = self._entries, self._alive
            if not entry.checked:
                entry.checked = True
                self._fresh.append(len(entries))
            if not entries:
                self._started = time.perf_counter()
            frame: Any = _getframe(1)
            site = frame.f_code
            while _INTERNAL.get(site) or (site not in _INTERNAL and is_internal(site)):
                frame = frame.f_back
                if frame is None:
                    break
                site = frame.f_code
            self._codes.append(site)
            self._offsets.append(frame.f_lasti if frame is not None else -1)
            entries.append(entry)
            self._code.append(entry.tid)
            self._code += slots
            if entry.literals:
                self._literals += entry.literals
            if floats:
                self._floats += floats
            if _grad_enabled():
                for t in tensors:
                    h = t._h
                    if h.root is None:
                        h.root = [True, False]
                    else:
                        h.root[0] = True
            single = entry.single
            if single is None:
                out = self._outputs(func, args, kwargs, entry, tensors, known)
            else:
                handle = Handle(self, base + len(alive))
                alive.append(1)
                if entry.views:
                    out = wrap_view(single, handle, tensors[0])
                    handle.root = tensors[0]._h.root
                    if tensors[0]._h.shadow is not None:
                        shadows.propagate(func, args, kwargs, (out,))
                        if handle.shadow is None:
                            shadows.kill(tensors)
                else:
                    out = wrap(single, handle)
                    if known and single.nbytes <= SHADOW_BYTES:
                        shadows.propagate(func, args, kwargs, (out,))
            if len(entries) >= self._chunk:
                self.flush()
            return out

    def _make_entry(self, func: Any, args: tuple, kwargs: dict[str, Any], tensors: list[LazyTensor]) -> Entry:
        try:
            return make_entry(func, args, kwargs, tensors)
        except DataDependent:
            return dynamic_entry(func, args, kwargs)

    def _outputs(
        self,
        func: Any,
        args: tuple,
        kwargs: dict[str, Any],
        entry: Entry,
        tensors: list[LazyTensor],
        known: bool,
    ) -> Any:
        """The outputs of ops that return several tensors, or write to their arguments."""
        alive, base = self._alive, self._base
        if entry.writes:
            shadows.write(func, args, kwargs, tensors, known)
            known = False
        flat: list[Any] = []
        for r in entry.results:
            if r.__class__ is int:
                flat.append(tensors[r])
            elif r is None:
                flat.append(None)
            else:
                handle = Handle(self, base + len(alive))
                alive.append(1)
                if entry.views:
                    flat.append(wrap_view(r, handle, tensors[0]))
                    handle.root = tensors[0]._h.root
                else:
                    flat.append(wrap(r, handle))
        if known and flat and all(s.nbytes <= SHADOW_BYTES for s in entry.outs):
            shadows.propagate(func, args, kwargs, flat)
        if entry.views and flat and flat[0]._h.shadow is None:
            shadows.kill(tensors)
        container = entry.container
        return (flat[0] if flat else None) if container is None else container(flat)

    def _argument(self, a: Any, add: Any, slots: list, floats: list, tensors: list) -> bool:
        """Adds one argument of any kind to the key; False when it holds a value the host lacks."""
        cls = a.__class__
        if a is None or cls is str or cls is torch.dtype or cls is torch.memory_format or cls is torch.layout:
            add(a)
            return True
        if cls is bool:
            add(_TRUE if a else _FALSE)
            return True
        if cls is int:
            add(a)
            return True
        if cls is float:
            add(_FLOAT)
            floats.append(a)
            return True
        if cls is LazyTensor:
            h = a._h
            gid = h.gid
            if h.rec is not self or gid == UNRECORDED:
                gid = self._adopt(h)
            add(a._spec)
            tensors.append(a)
            slots.append(gid - self._base if gid >= self._base else self._external(gid))
            return h.shadow is not None
        if cls is list or cls is tuple:
            known, part = True, []
            for x in a:
                if x.__class__ is float:
                    part.append(repr(x))
                    floats.append(x)
                else:
                    known &= self._argument(x, part.append, slots, floats, tensors)
            add(tuple(part))
            return known
        if cls is torch.device:
            add(cls)
            return True
        if isinstance(a, (torch.SymInt, torch.SymFloat, torch.SymBool)):
            raise UnsupportedOpError(
                "symbolic sizes cannot be captured lazily: compile with backend='genie' instead"
            )
        if isinstance(a, Tensor):
            raise HostOperandError
        add((cls, repr(a)))
        return True

    def _external(self, gid: int) -> int:
        slot = self._ext.get(gid)
        if slot is None:
            slot = self._ext[gid] = -len(self._ext) - 1
        return slot

    def _adopt(self, h: Handle) -> int:
        """The slow ways to a gid: an ``empty`` recorded at its first use, or a foreign handle."""
        if h.rec is not self:
            why = h.rec.closed
            raise SessionClosedError(
                f"this tensor belongs to a session that has ended ({why}): move the model to the new one"
                if why
                else "tensors of two Genie sessions met in one op: move one of them with .cpu()"
            )
        func, args, kwargs = h.empty
        fresh = self.record(func, args, kwargs)
        h.empty = None
        other = fresh._h
        h.gid, other.gid = other.gid, UNRECORDED
        return h.gid

    def _record_dynamic(self, func, args, kwargs, entry, slots, floats, tensors) -> Any:  # type: ignore[no-untyped-def]
        """An op whose output specs only the server can tell: run up to it and ask."""
        if entry.writes:
            _check_roots(func, [tensors[r] for r in entry.results if r == 0])
            shadows.write(func, args, kwargs, tensors, False)
        self._append(entry, slots, floats)
        handles = []
        for _ in (r for r in entry.results if r is None):
            handles.append(Handle(self, self._base + len(self._alive)))
            self._alive.append(1)
        described = self.flush(describe=[h.gid for h in handles]).described if handles else []
        outs: list[Any] = []
        values = iter(zip(handles, described, strict=True))
        for r in entry.results:
            outs.append(tensors[r] if r is not None else _described(*next(values)))
        return outs[0] if entry.container is None else tuple(outs)

    def _append(self, entry: Entry, slots: list[int], floats: list[float]) -> None:
        if not self._entries:
            self._started = time.perf_counter()
        frame: FrameType | None = _getframe(2)
        while frame is not None and is_internal(frame.f_code):
            frame = frame.f_back
        self._codes.append(frame.f_code if frame is not None else None)
        self._offsets.append(frame.f_lasti if frame is not None else -1)
        self._entries.append(entry)
        self._code.append(entry.tid)
        self._code += slots
        self._literals += entry.literals
        self._floats += floats

    # -- values from and to the host -------------------------------------------------------------

    def bind_host(self, tensor: Tensor, is_parameter: bool) -> Handle:
        """A handle for the present content of a dense CPU tensor."""
        with self.lock:
            self._uploads += 1
            handle = Handle(self, -self._uploads)
            if tensor.nbytes <= self.executor.inline_bytes and not is_parameter:
                copy = tensor.detach().clone(memory_format=torch.preserve_format)
                self._inputs.append((handle.gid, copy))
                if tensor.nbytes <= SHADOW_BYTES:
                    # The shadow may be written to by later ops; the copy that travels must not.
                    handle.shadow = Shadow(copy.clone(), [True])
            else:
                self.executor.upload(handle.gid, tensor, is_parameter)
            return handle

    def fetch(self, tensors: list[LazyTensor]) -> list[Tensor]:
        """The tensors' values on the CPU: one round trip, or none where the host knows them."""
        with self.lock:
            shadows_ = [t._h.shadow for t in tensors]
            if all(s is not None and s.alive[0] for s in shadows_):
                return [s.tensor.clone() for s in shadows_]  # type: ignore[union-attr]
            gids = [self.gid_of(t) for t in tensors]
            self.syncs += 1
            return self.flush(fetch=gids).fetched

    def flush(self, fetch: list[int] | None = None, describe: list[int] | None = None) -> Outcome:
        """Sends what is recorded. Raises the server's error, naming the Python line it came from."""
        with self.lock:
            if self.closed:
                raise SessionClosedError(f"this session has ended ({self.closed}): open a new one")
            if not (self._entries or fetch or describe or self._inputs or self.dead):
                return Outcome()
            program = self._finish()
            try:
                outcome = self.executor.execute(program, fetch or [], describe or [])
            except RemoteError as exc:
                self._add_site(exc)
                raise
            for r in outcome.relayouts:
                program.entries[r.instruction].correct(r.output, r.stride)
            return outcome

    def _finish(self) -> Program:
        old_alive, base, ended = self._alive, self._base, time.perf_counter()
        dead, self.dead = self.dead, []
        program = Program(
            key=(b"", b""),
            n_ext=len(self._ext),
            n_slots=len(old_alive),
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
        )
        code = array("i", self._code).tobytes()
        self._recent.append((self.ops, self._codes, self._offsets))
        self.programs += 1 if self._entries else 0
        self.ops += len(self._entries)
        self.capture_s += program.capture_s
        self._begin(base + len(old_alive))
        kept = array("i", [i for i, a in enumerate(old_alive) if a]).tobytes()
        program.key = (code, kept)
        return program

    def _add_site(self, exc: RemoteError) -> None:
        """Tells in the error which Python line recorded the instruction that failed, if it is recent."""
        number = getattr(exc, "instruction", -1)
        for first, codes, offsets in self._recent:
            code = codes[number - first] if first <= number < first + len(codes) else None
            if code is not None:
                site = describe(code, offsets[number - first])
                exc.args = (f"{exc.args[0]}\n  recorded at {site}", *exc.args[1:])

    def gid_of(self, t: LazyTensor) -> int:
        """The gid of a tensor, recording an ``empty`` that nothing has used yet."""
        gid = t._h.gid
        return self._adopt(t._h) if t._h.rec is not self or gid == UNRECORDED else gid

    def seed(self, seed: int) -> None:
        """Seeds the session's random numbers, in program order."""
        with self.lock:
            tid = define("genie::manual_seed", [["i"]], {}, [])
            entry = Entry("genie::manual_seed", tid, (seed,), [], None, False)
            self._append(entry, [], [])

    def close(self, reason: str) -> None:
        """Ends the session: later use of its tensors raises SessionClosedError."""
        with self.lock:
            if self.closed is None:
                self.closed = reason
                self.executor.close()


def _check_roots(func: Any, written: list[LazyTensor]) -> None:
    """A write that a pending backward could not notice is refused (see `direct`)."""
    for t in written:
        root = t._h.root
        if root is not None and root[0] and root[1]:
            raise UnsupportedOpError(
                f"{func} writes to a tensor with views made under no_grad that autograd has used since: "
                "PyTorch could not tell a pending backward; make the views anew, or write to a clone"
            )


def _described(handle: Handle, s: TensorSpec) -> LazyTensor:
    return wrap(_spec_from_wire(s), handle)


def _spec_from_wire(s: TensorSpec) -> Spec:
    return spec(tuple(s.shape), tuple(s.stride), s.offset, getattr(torch, s.dtype))
