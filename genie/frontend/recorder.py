"""Records operations on device ``genie`` in program order.

`Recorder.record` takes any call: build a key, look up its `Entry`, append a few ints, wrap the
outputs. Shape inference, patterns and checks happen once per key, on a miss. The hottest ops do the
same in generated code of their own (see `kernels`).
"""

from __future__ import annotations

import sys
import time
from sys import _getframe
from typing import Any

import torch
from torch import Tensor
from torch import is_grad_enabled as _grad_enabled

from genie.errors import SessionClosedError, UnsupportedOpError
from genie.frontend import kernels, shadows
from genie.frontend.callsite import user_frame
from genie.frontend.entries import DataDependent, Entry, define, dynamic_entry, learned_entry, make_entry
from genie.frontend.handle import UNRECORDED, Handle, Value
from genie.frontend.program import Executor
from genie.frontend.specs import Spec, spec
from genie.frontend.stream import SHADOW_BYTES, ProgramStream
from genie.frontend.tensor import LazyTensor, wrap, wrap_view
from genie.wire.messages import TensorSpec

_TRUE, _FALSE, _FLOAT, _KWARGS = object(), object(), object(), object()


def _any_requires_grad(tensors: list[LazyTensor]) -> bool:
    for t in tensors:  # noqa: SIM110 - a generator would cost more than the loop
        if t.requires_grad:
            return True
    return False


def _all_ints(items: list) -> bool:
    for x in items:  # noqa: SIM110 - a generator would cost more than the loop
        if x.__class__ is not int:
            return False
    return True


def _lost(why: str) -> str:
    return (
        f"this tensor belongs to a session that has ended ({why}), and its values are gone: load the model "
        "anew in the new session, and fetch what must outlive one with .cpu() while it is open"
    )


class _Ended:
    """In the place of an ended recorder's tables: the lookup that starts every recording raises."""

    def __init__(self, reason: str) -> None:
        self._reason = reason

    def get(self, key: Any) -> Any:
        raise SessionClosedError(_lost(self._reason))


class HostOperandError(Exception):
    """A CPU tensor is among an op's arguments (`dispatch` lifts it where that is allowed)."""


class Recorder(ProgramStream):
    """One per session. Not shared between sessions; its lock makes it safe between threads."""

    def __init__(self, executor: Executor) -> None:
        super().__init__(executor)
        self.entries: dict[tuple, Entry] = {}
        #: entries by the short keys of the generated kernels
        self.tables: list[dict[Any, Entry]] = [{} for _ in range(kernels.count())]
        self._last: Entry | None = None

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
            self._last = entry
            if entry.dynamic:
                asked = self._record_dynamic(func, args, kwargs, entry, slots, floats, tensors)
                if entry.once:
                    known_now = self.entries[hashed] = learned_entry(entry, [t._spec for t in asked])
                    known_now.ins = entry.ins
                return asked

            if entry.writes:
                check_roots(func, [tensors[r] for r in entry.results if r.__class__ is int] or tensors)
            entries = self._entries
            if not entry.checked:
                entry.checked = True
                self._fresh.append(len(entries))
            if not entries:
                self._started = time.perf_counter()
            self._add_caller(_getframe(1))
            entries.append(entry)
            self._code.append(entry.tid)
            self._code += slots
            if entry.literals:
                self._literals += entry.literals
            if floats:
                self._floats += floats
            if _grad_enabled() and _any_requires_grad(tensors):
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
                handle = self._new_value()
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

    def record_first(
        self, func: Any, call: tuple[tuple, dict[str, Any]], table: dict[Any, Entry], key: Any
    ) -> Any:
        """Records for a generated kernel that has not met this call's key, and fills its table."""
        out = self.record(func, *call)
        entry = self._last
        if entry is not None and not (entry.dynamic or entry.writes) and None not in entry.results:
            table[key] = entry
        return out

    def _make_entry(self, func: Any, args: tuple, kwargs: dict[str, Any], tensors: list[LazyTensor]) -> Entry:
        try:
            entry = make_entry(func, args, kwargs, tensors)
        except DataDependent:
            entry = dynamic_entry(func, args, kwargs)
        entry.ins = tuple(t._spec for t in tensors)
        return entry

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
                handle = self._new_value()
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

    def _new_value(self) -> Value:
        """A name for the next tensor that the program makes."""
        made = self._made
        value = Value()
        value.rec, value.gid, value.shadow, value.root = self, self._base + len(made), None, None
        made.append(value)
        return value

    def close(self, reason: str) -> None:
        """Ends the session: reading its tensors, and recording ops on them, raises SessionClosedError."""
        super().close(reason)
        ended: Any = _Ended(reason)
        self.entries, self.tables = ended, [ended] * len(self.tables)

    def _add_caller(self, frame: Any) -> None:
        found = user_frame(frame)
        self._sites += (None, -1) if found is None else (found.f_code, found.f_lasti)

    def external_slot(self, h: Value) -> int:
        """The slot of a value that the current program did not make (or has yet to: an ``empty``)."""
        gid = h.gid
        if h.rec is not self or gid == UNRECORDED:
            gid = self._adopt(h)
        return gid - self._base if gid >= self._base else self._external(gid)

    def _external(self, gid: int) -> int:
        slot = self._ext.get(gid)
        if slot is None:
            slot = self._ext[gid] = -len(self._ext) - 1
        return slot

    def _adopt(self, h: Value) -> int:
        """The slow ways to a gid: an ``empty`` recorded at its first use, or a foreign handle."""
        if h.rec is not self:
            why = h.rec.closed or self.closed
            raise SessionClosedError(
                _lost(why)
                if why
                else "tensors of two Genie sessions met in one op: move one of them with .cpu()"
            )
        func, args, kwargs = h.empty
        chunk, self._chunk = self._chunk, sys.maxsize  # slots of the op that asks are counted from here
        try:
            h.gid = self.record(func, args, kwargs)._h.gid
        finally:
            self._chunk = chunk
        h.empty = None
        h.__class__ = Value
        self._made[h.gid - self._base] = h
        return h.gid

    def _record_dynamic(self, func, args, kwargs, entry, slots, floats, tensors) -> Any:  # type: ignore[no-untyped-def]
        """An op whose output specs only the server can tell: run up to it and ask."""
        if entry.writes:
            check_roots(func, [tensors[r] for r in entry.results if r == 0])
            shadows.write(func, args, kwargs, tensors, False)
        self._append(entry, slots, floats)
        handles = []
        for _ in (r for r in entry.results if r is None):
            handles.append(self._new_value())
        described = self.flush(describe=[h.gid for h in handles]).described if handles else []
        outs: list[Any] = []
        values = iter(zip(handles, described, strict=True))
        for r in entry.results:
            outs.append(tensors[r] if r is not None else _described(*next(values)))
        return outs[0] if entry.container is None else tuple(outs)

    def _append(self, entry: Entry, slots: list[int], floats: list[float]) -> None:
        if not self._entries:
            self._started = time.perf_counter()
        self._add_caller(_getframe(2))
        self._entries.append(entry)
        self._code.append(entry.tid)
        self._code += slots
        self._literals += entry.literals
        self._floats += floats

    def new_handle(self, gid: int) -> Handle:
        return Handle(self, gid)

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

    def rng_state(self) -> Tensor:
        """The state of the session's random numbers after all that is recorded: a CPU ByteTensor."""
        with self.lock:
            tid = define("genie::get_rng_state", [], {}, [-1])
            self._append(Entry("genie::get_rng_state", tid, (), [], None, False), [], [])
            handle = self._new_value()
            return self.flush(fetch=[handle.gid], cause="get_rng_state").fetched[0]

    def set_rng_state(self, state: Tensor) -> None:
        """Sets it, in program order. The server refuses what is no state of its device's generator."""
        with self.lock:
            handle = self.bind_host(state.contiguous(), False)
            tid = define("genie::set_rng_state", [["t"]], {}, [])
            entry = Entry("genie::set_rng_state", tid, (), [], None, False)
            self._append(entry, [self._external(handle.gid)], [])


def check_roots(func: Any, written: list[LazyTensor]) -> None:
    """A write that a pending backward could not notice is refused (see `direct`)."""
    for t in written:
        root = t._h.root
        if root is not None and root[0] and root[1]:
            raise UnsupportedOpError(
                f"{func} writes to a tensor with views made under no_grad that autograd has used since: "
                "PyTorch could not tell a pending backward; make the views anew, or write to a clone"
            )


def _described(handle: Value, s: TensorSpec) -> LazyTensor:
    return wrap(_spec_from_wire(s), handle)


def _spec_from_wire(s: TensorSpec) -> Spec:
    return spec(tuple(s.shape), tuple(s.stride), s.offset, getattr(torch, s.dtype))
