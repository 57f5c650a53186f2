"""The handle table of one session: handles (ints) to tensors, with the aliasing between them.

Free of sockets and messages, so a session inside the client's own process uses it as well.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from genie.errors import OutOfMemoryError, ProtocolError
from genie.server.engines.kv import State, Value, as_tensor

MAX_HANDLES = 1 << 22


def storage_key(tensor: Tensor) -> int:
    """Identifies the tensor's storage while it is alive; equal for all views of it."""
    return tensor.untyped_storage()._cdata


def _nbytes(value: Value) -> int:
    return value.nbytes if isinstance(value, State) else value.untyped_storage().nbytes()


class Pending(Protocol):
    """A tensor on its way here from another server."""

    nbytes: int
    shared: bool

    def take(self) -> Tensor | Exception:
        """Waits for it, with a timeout; returns the error if it does not come."""

    def abandon(self) -> None:
        """It will not be used."""


class HandleStore:
    """``limit``: bytes of unique storages that may be held; 0 = no limit.

    A handle is bound to a tensor, to one on its way (the first use waits for it: `settle` them before
    taking a lock), to a state in place (a tensor is made of it when one is asked for), or poisoned with
    the error that kept it from being made. Content
    bound with ``shared=True`` is read-only for this session: call `make_private` before writing.
    """

    def __init__(self, limit: int = 0) -> None:
        self.limit = limit
        self._tensors: dict[int, Tensor] = {}
        self._poisoned: dict[int, Exception] = {}
        self._pending: dict[int, Pending] = {}  # handles in no other table
        self._states: dict[int, State] = {}  # likewise
        self._uploaded: set[int] = set()
        # Weak references keep the keys from being reused by the allocator, not the contents alive.
        self._shared: dict[int, StorageWeakRef] = {}
        self._pristine: dict[int, tuple[StorageWeakRef, int]] = {}
        #: of each program that ran before it was asked for, oldest first, the values that it is to bind
        self._ahead: list[Sequence[Value | None]] = []
        self._bound_bytes = 0  # never less than the bytes held; exact after `held_bytes`

    def __len__(self) -> int:
        return len(self._tensors) + len(self._pending) + len(self._states)

    def __contains__(self, handle: int) -> bool:
        return handle in self._tensors or handle in self._pending or handle in self._states

    # -- binding and reading -------------------------------------------------------------------

    def bind(self, handle: int, tensor: Tensor, *, shared: bool = False, uploaded: bool = False) -> None:
        """Binds or rebinds a handle. ``uploaded`` content survives `forget_results`.

        Raises ProtocolError over 4 M handles. Does not check the limit: see `reserve` and `over_limit`.
        """
        if len(self._tensors) >= MAX_HANDLES:
            raise ProtocolError(f"a session may hold {MAX_HANDLES} handles: release some")
        self._tensors[handle] = tensor
        if self._poisoned:
            self._poisoned.pop(handle, None)
        if self._pending or self._states:
            self._abandon(handle)
        if self.limit:
            self._bound_bytes += tensor.untyped_storage().nbytes()
        if uploaded:
            self._uploaded.add(handle)
            self._pristine[storage_key(tensor)] = (StorageWeakRef(tensor.untyped_storage()), handle)
        elif self._uploaded:
            self._uploaded.discard(handle)
        if shared:
            self._shared[storage_key(tensor)] = StorageWeakRef(tensor.untyped_storage())

    def bind_pending(self, handle: int, pending: Pending) -> None:
        """Raises ProtocolError over 4 M handles."""
        if len(self) >= MAX_HANDLES:
            raise ProtocolError(f"a session may hold {MAX_HANDLES} handles: release some")
        self.free((handle,))
        self._pending[handle] = pending
        self._bound_bytes += pending.nbytes

    @property
    def has_pending(self) -> bool:
        return bool(self._pending)

    def awaits(self, handles: Iterable[int]) -> bool:
        """Whether one of them is on its way here."""
        return bool(self._pending) and any(h in self._pending for h in handles)

    def settle(self, handles: Iterable[int]) -> None:
        """Waits for those of the handles that are pending; each is then bound or poisoned. Raises nothing."""
        for handle in handles:
            pending = self._pending.pop(handle, None)
            if pending is None:
                continue
            value = pending.take()
            if isinstance(value, Tensor):
                self._bound_bytes -= pending.nbytes  # `bind` counts it again
                self.bind(handle, value, shared=pending.shared, uploaded=pending.shared)
            else:
                self._poisoned[handle] = value

    def settle_all(self) -> None:
        self.settle(list(self._pending))

    def _abandon(self, handle: int) -> None:
        self._states.pop(handle, None)
        pending = self._pending.pop(handle, None)
        if pending is not None:
            pending.abandon()

    def bind_kept(self, base: int, names: Iterable[int], values: Iterable[Value | None]) -> None:
        """Binds a program's kept values: each to handle ``base`` + its name."""
        tensors, uploaded, poisoned, limit = self._tensors, self._uploaded, self._poisoned, self.limit
        pending = bool(self._pending or self._states)
        if len(tensors) > MAX_HANDLES - 100_000:
            raise ProtocolError(f"a session may hold {MAX_HANDLES} handles: release some")
        for name, value in zip(names, values, strict=True):
            if value is not None:
                handle = base + name
                if pending:
                    self._abandon(handle)
                if isinstance(value, State):
                    self._states[handle] = value
                    tensors.pop(handle, None)
                else:
                    tensors[handle] = value
                if handle in uploaded:
                    uploaded.discard(handle)
                if poisoned:
                    poisoned.pop(handle, None)
                if limit:
                    self._bound_bytes += _nbytes(value)

    def get(self, handle: int) -> Tensor:
        """Raises the error that poisoned the handle, or ProtocolError for one that was never bound."""
        try:
            return self._tensors[handle]
        except KeyError:
            if handle in self._pending:
                self.settle((handle,))
                return self.get(handle)
            if handle in self._states:
                tensor = self._tensors[handle] = self._states.pop(handle).take()
                return tensor
            raise self._missing(handle) from None

    def get_all(self, handles: Sequence[int]) -> list[Tensor]:
        """`get` for many handles."""
        tensors = self._tensors
        try:
            return [tensors[h] for h in handles]
        except KeyError as exc:
            if not self._pending and not self._states:
                raise self._missing(exc.args[0]) from None
        return [self.get(h) for h in handles]

    def peek_all(self, handles: Sequence[int]) -> list[Value]:
        """As `get_all`, but states stay what they are."""
        if not self._states:
            return [*self.get_all(handles)]
        states = self._states.get
        tensors = self._tensors.get
        found: list[Value] = []
        for h in handles:
            value: Value | None = tensors(h)
            if value is None:
                value = states(h)
            found.append(self.get(h) if value is None else value)
        return found

    def _missing(self, handle: int) -> Exception:
        error = self._poisoned.get(handle)
        if error is not None:
            return copy.copy(error)
        return ProtocolError(f"handle {handle} is not bound in this session: it was released, or never made")

    def is_poisoned(self, handle: int) -> bool:
        return handle in self._poisoned

    def poison(self, handles: Iterable[int], error: Exception) -> None:
        """Later uses of the handles raise a copy of ``error`` (which must not hold a traceback)."""
        if len(self._poisoned) < MAX_HANDLES:
            for handle in handles:
                self._tensors.pop(handle, None)
                if self._pending or self._states:
                    self._abandon(handle)
                self._poisoned[handle] = error

    def free(self, handles: Iterable[int]) -> None:
        """Forgets handles; unknown ones are ignored (their program may have failed)."""
        pop = self._tensors.pop
        for handle in handles:
            pop(handle, None)
            if self._poisoned:
                self._poisoned.pop(handle, None)
            if self._uploaded:
                self._uploaded.discard(handle)
            if self._pending or self._states:
                self._abandon(handle)

    def clear(self) -> None:
        """Forgets all. What is pending must have ended."""
        for table in (
            self._tensors,
            self._states,
            self._pending,
            self._ahead,
            self._poisoned,
            self._uploaded,
            self._shared,
            self._pristine,
        ):
            table.clear()

    # -- memory --------------------------------------------------------------------------------

    @property
    def held_bytes(self) -> int:
        """Bytes of the unique storages behind all handles, and of those on their way."""
        sizes: dict[int, int] = {}
        self._bound_bytes = self.add_sizes(sizes) + sum(sizes.values())
        return self._bound_bytes

    def add_sizes(self, sizes: dict[int, int]) -> int:
        """Adds each storage's key and bytes; returns those of what has none of its own: on its way, or a
        state. Any thread may call it."""
        values: list[Value | None] = list(self._tensors.values())
        values += list(self._states.values())
        for made_ahead in list(self._ahead):
            values += made_ahead
        states = 0
        for value in values:
            if isinstance(value, State) and value.step is not None:
                states += value.nbytes
            elif value is not None:
                value = as_tensor(value)
                storage = value.untyped_storage()
                sizes[storage._cdata] = storage.nbytes()
        return states + sum(p.nbytes for p in list(self._pending.values()))

    def reserve(self, nbytes: int) -> None:
        """Raises OutOfMemoryError when ``nbytes`` more would be over the limit. Allocates nothing."""
        if self.limit and self._bound_bytes + nbytes > self.limit and self.held_bytes + nbytes > self.limit:
            raise OutOfMemoryError(
                f"this session holds {self._bound_bytes} bytes and asks for {nbytes} more, over its limit of "
                f"{self.limit}: release tensors, or start the server with a larger --memory-limit"
            )

    def hold_ahead(self, values: Sequence[Value | None]) -> None:
        """Counts the values of a program that nobody asked for yet as held, until `let_go`. Raises
        OutOfMemoryError, and does not, when that is over the limit."""
        self._ahead.append(values)
        if self.limit:
            self._bound_bytes += sum(_nbytes(v) for v in values if v is not None)
            try:
                self.reserve(0)
            except OutOfMemoryError:
                self._ahead.pop()
                raise

    def let_go(self, programs: int | None = None) -> None:
        """No longer counts the values of the oldest programs that ran ahead, or of all."""
        del self._ahead[:programs]

    def holds(self, storage: torch.UntypedStorage) -> bool:
        """A shared or uploaded content that this session has a handle on already."""
        weak = self._shared.get(storage._cdata)
        return weak is not None and not weak.expired()

    # -- writing to shared content ---------------------------------------------------------------

    def before_write(self, tensors: Iterable[Tensor], *, still_pristine: bool = False) -> int:
        """To be called with the externals that a program may write to. Shared content is copied, and
        every handle on it rebound. Returns the number of copies; the caller must fetch its tensors anew.

        ``still_pristine``: the caller finds out itself whether the write happens (`written`).
        """
        if not self._shared and not self._pristine:
            return 0
        copies = 0
        for key in {storage_key(t): t for t in tensors}:
            if key in self._shared:
                key = self._make_private(key)
                copies += 1
            if not still_pristine:
                self._pristine.pop(key, None)
        return copies

    def _make_private(self, key: int) -> int:
        """Rebinds every handle on the storage to a copy, with its geometry; returns the copy's key."""
        aliases = [(h, t) for h, t in self._tensors.items() if storage_key(t) == key]
        storage = aliases[0][1].untyped_storage().clone()
        for handle, t in aliases:
            view = torch.empty(0, dtype=t.dtype, device=t.device)
            view.set_(storage, t.storage_offset(), t.shape, t.stride())
            self._tensors[handle] = view
        self._bound_bytes += storage.nbytes()
        self._shared.pop(key)
        if key in self._pristine:
            self._pristine[storage._cdata] = (StorageWeakRef(storage), self._pristine.pop(key)[1])
        return storage._cdata

    # -- stateless programs ----------------------------------------------------------------------

    def written(self, keys: Iterable[int]) -> None:
        """The storages no longer hold what was uploaded into them."""
        for key in keys:
            self._pristine.pop(key, None)

    def pristine_handle(self, key: int) -> int | None:
        """The uploaded handle whose unmodified content the storage is, if it is one."""
        entry = self._pristine.get(key)
        return entry[1] if entry is not None and entry[1] in self._uploaded else None

    def forget_results(self) -> None:
        """Frees all but what was uploaded (or is on its way as such) and is unmodified."""
        keep = {}
        for handle in self._uploaded:
            tensor = self._tensors.get(handle)
            if tensor is not None and storage_key(tensor) in self._pristine:
                keep[handle] = tensor
        for handle in [h for h, p in self._pending.items() if not p.shared]:
            self._abandon(handle)
        self._tensors = keep
        self._states.clear()
        self._uploaded &= keep.keys()
        self._poisoned.clear()
        self.purge()

    def purge(self) -> None:
        """Drops the bookkeeping of contents that are gone."""
        self._shared = {k: w for k, w in self._shared.items() if not w.expired()}
        self._pristine = {k: e for k, e in self._pristine.items() if not e[0].expired()}
