"""Programs that run before their client asks for them.

A client that decodes sends the same few programs for every token, with nothing in them that could not be
foreseen: their vectors come as both ends predict them (`genie.wire.vectors`), handles go on as they went on
before. A *window* is what comes between two replies. Once the last two windows were alike and the last one's
vectors were as predicted, the server composes the next one, and runs it while it has nothing else to do.

What runs ahead is invisible: its values are bound to no handle, nothing is released, no receipt is kept, the
random state is not touched, and no program runs ahead that writes to anything but its own values. When a
request turns out to be the very one that was foreseen, it is given what was made; at the first one that is
not, all of that is dropped, and the request runs as it always did. So a wrong guess costs time only: at most
one program's, for before each the server looks whether a request has come.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from msgspec import structs
from torch import Tensor

from genie.server.bounds import Bounds
from genie.server.engine import Template
from genie.server.engines.kv import Value, as_tensor
from genie.wire.messages import Execute, TensorSpec
from genie.wire.tensors import spec_of, to_wire
from genie.wire.vectors import Vectors

if TYPE_CHECKING:
    from genie.server.device import Device
    from genie.server.execute import Executor
    from genie.server.store import HandleStore
    from genie.server.timing import Ran

log = logging.getLogger("genie.server")

#: programs that a window may have
MAX_PROGRAMS = 64
#: windows alike after which the next one is foreseen; twice as many after each further miss in a row
ALIKE = 2
MAX_ALIKE = 64


def to_wires(tensors: Iterable[Tensor]) -> tuple[list[TensorSpec], list[memoryview], list[object]]:
    """What is fetched, as it travels: specs, bytes, and the tensors that own the bytes."""
    specs: list[TensorSpec] = []
    pieces: list[memoryview] = []
    owners: list[object] = []
    for tensor in tensors:
        spec, data, owner = to_wire(tensor)
        specs.append(spec)
        pieces.append(data)
        owners.append(owner)
    return specs, pieces, owners


def described(tensor: Tensor) -> TensorSpec:
    return structs.replace(spec_of(tensor), offset=tensor.storage_offset())


@dataclass(slots=True)
class _Seen:
    """What tells one request of a window from another. Nothing else is in those that can be foreseen."""

    template: int
    lane: int
    quiet: bool
    base: int
    fetch: list[int]
    describe: list[int]
    as_predicted: bool

    def like(self, other: _Seen, moved: int) -> bool:
        """``moved``: how far handles moved from the other's window to this one's."""
        return (
            self.template == other.template
            and self.lane == other.lane
            and self.quiet == other.quiet
            and self.base == other.base + moved
            and len(self.fetch) == len(other.fetch)
            and len(self.describe) == len(other.describe)
        )


@dataclass(slots=True)
class Foreseen:
    """A program of the next window; from ``ran`` on, once it has run."""

    seen: _Seen
    template: Template
    vectors: Vectors
    ran: Ran | None = None
    #: what is fetched, in host memory; waits for it
    read: Callable[[], list[Tensor]] = list
    described: list[TensorSpec] = field(default_factory=list)

    def is_asked_for_by(self, m: Execute, vectors: Vectors) -> bool:
        seen = self.seen
        return (
            m.template == seen.template
            and m.base == seen.base
            and m.lane == seen.lane
            and m.quiet == seen.quiet
            and m.fetch == seen.fetch
            and m.describe == seen.describe
            and _is_plain(m)
            and not m.vectors  # they are as both ends predict them, bit by bit
            and vectors == self.vectors
        )


def _is_plain(m: Execute) -> bool:
    """Whether the request runs a template and does nothing else that counts."""
    return m.template >= 0 and not (
        m.body or m.inputs or m.storages or m.checks or m.evict or m.release or m.release_after or m.stateless
    )


class RunAhead:
    """Of one session. ``windows``: how many may be made before they are asked for; 0 switches it off."""

    def __init__(self, executor: Executor, device: Device, store: HandleStore) -> None:
        self.windows = 0
        self._executor, self._device, self._store = executor, device, store
        self._window: list[_Seen] | None = []  # that goes on; None: it cannot be foreseen
        self._last: list[_Seen] = []
        self._moved = 0  # from the window before the last to the last
        self._alike = 0  # windows in a row
        self._misses = 0  # in a row
        self._hit = False  # in this window, and no miss
        self._ran: deque[Foreseen] = deque()  # not asked for yet
        self._to_run: deque[Foreseen] = deque()
        self._overlay: dict[int, Value] = {}  # what handles will be bound to
        self._freed: set[int] = set()  # handles that will have been freed
        #: what a CPU answers with an error
        self.checks_bounds = device.is_cuda
        self._bounds: dict[Template, Bounds] = {}
        self._handed_over = 0  # that no receipt has told
        self._missed = False
        self._missed_cpu_s = 0.0

    # -- what comes --------------------------------------------------------------------------------

    def take(self, m: Execute, vectors: Vectors) -> Foreseen | None:
        """What was made for this request, if it ran ahead. Else nothing that did is left."""
        made = self._ran or self._to_run  # if it comes before its turn, the rest may still run ahead
        if not made:
            return None
        if not made[0].is_asked_for_by(m, vectors):
            self.drop()
            return None
        foreseen = made.popleft()
        if not self._ran:
            # All that was made so far is, or will be before the next step, where the handles say.
            self._forget_overlay()
        return None if foreseen.ran is None else foreseen

    def handed_over(self) -> None:
        """A foreseen program's values are bound now."""
        self._store.let_go(1)
        self._handed_over += 1
        self._hit = True

    def saw(self, m: Execute) -> None:
        """A request was done, and answered if it is to be."""
        if not self.windows:
            return
        window = self._window
        if window is not None:
            if _is_plain(m) and len(window) < MAX_PROGRAMS:
                window.append(_Seen(m.template, m.lane, m.quiet, m.base, m.fetch, m.describe, not m.vectors))
            else:
                window = self._window = None
        if not m.quiet:
            self._end_window(window)

    def _end_window(self, window: list[_Seen] | None) -> None:
        last = self._last
        self._window = []
        if self._hit:
            self._hit, self._misses = False, 0
        if not window:
            self._last, self._alike = [], 0
            return
        moved = window[0].base - last[0].base if last else 0
        if len(window) != len(last) or not all(
            new.like(old, moved) for new, old in zip(window, last, strict=True)
        ):
            self._alike = 1
        elif self._alike < ALIKE or moved == self._moved:
            self._alike += 1
        else:
            self._alike = ALIKE
        self._last, self._moved = window, moved
        needed = min(ALIKE << max(0, self._misses - 1), MAX_ALIKE)
        self._forget_overlay()
        if self._alike >= needed and all(seen.as_predicted for seen in window):
            self._compose(last, window)

    def interrupt(self) -> None:
        """Something else than a program comes that may touch what the session holds, or a program failed:
        nothing that was foreseen is left."""
        self.drop()
        self._window = None

    def drop(self) -> None:
        """Nobody will ask for what was foreseen."""
        if self._ran:
            self._missed = True
            self._count_miss()
            self._missed_cpu_s += sum(one.ran.cpu_s for one in self._ran if one.ran is not None)
            self._store.let_go()
        self._ran.clear()
        self._to_run.clear()
        self._forget_overlay()

    def _forget_overlay(self) -> None:
        self._overlay.clear()
        self._freed.clear()

    def _count_miss(self) -> None:
        self._hit = False
        self._misses = min(self._misses + 1, MAX_ALIKE)
        self._alike = 0

    def bill(self, m: Execute, counters: dict[str, int]) -> float:
        """For a program's receipt: that of a reply counts as ``ahead`` the programs since the last reply that
        ran ahead; the first one after a miss says so. Returns the CPU-seconds spent in vain."""
        # One number a reply, for receipts are most of what a decoded token costs on the wire.
        if self._handed_over and not m.quiet:
            counters["ahead"], self._handed_over = self._handed_over, 0
        if self._missed:
            counters["ahead_missed"], self._missed = 1, False
        seconds, self._missed_cpu_s = self._missed_cpu_s, 0.0
        return seconds

    # -- what will come ----------------------------------------------------------------------------

    def _compose(self, before: Sequence[_Seen], last: Sequence[_Seen]) -> None:
        """The next window, if it can be told and leaves no trace."""
        executor = self._executor
        if executor.trace is not None or len({(s.template, s.lane) for s in last}) < len(last):
            return
        composed = []
        for old, seen in zip(before, last, strict=True):
            template = executor.templates.get(seen.template)
            if not isinstance(template, Template) or template.mutated_ext:
                return
            base = seen.base + self._moved
            vectors = executor.foresee(seen.template, seen.lane, base)
            if len(vectors.floats) != template.n_floats or template.draws(vectors.floats):
                return
            if self.checks_bounds and not self._bounds_of(template).provable:
                return
            fetch = _next(old.fetch, seen.fetch)
            describe = _next(old.describe, seen.describe)
            composed.append(
                Foreseen(
                    _Seen(seen.template, seen.lane, seen.quiet, base, fetch, describe, True),
                    template,
                    vectors,
                )
            )
        self._to_run.extend(composed)

    @property
    def is_due(self) -> bool:
        """Whether there is something for `step` to do."""
        return bool(self._to_run)

    def step(self) -> bool:
        """Runs one more program ahead. False when it is better not to now."""
        device = self._device
        with device.lock:
            if device.waiting:
                return False
            foreseen = self._to_run.popleft()
            try:
                self._run(foreseen)
            except Exception as exc:  # noqa: BLE001 - it is raised again where it belongs: see below
                # If the client asks for this program it runs once more, and its failure is the client's. The
                # programs before it are as good as they were.
                log.debug("stopped running ahead: %s: %s", type(exc).__name__, exc)
                self._count_miss()
                if foreseen.ran is not None:
                    self._missed_cpu_s += foreseen.ran.cpu_s
                self._to_run.clear()
                self._forget_overlay()
                return False
        return True

    def _run(self, foreseen: Foreseen) -> None:
        seen, vectors = foreseen.seen, foreseen.vectors
        ext = self._values(vectors.ext)
        if self.checks_bounds:
            bounds = self._bounds_of(foreseen.template)
            if not bounds.hold(ext, vectors.literals, vectors.floats):
                raise _Unforeseeable("an index would be out of bounds")
        foreseen.ran = ran = self._executor.compute(foreseen.template, seen.lane, ext, vectors, [])
        for name, value in zip(foreseen.template.kept_names, ran.values, strict=True):
            if value is not None:
                self._overlay[seen.base + name] = value
                self._freed.discard(seen.base + name)
        wanted = [as_tensor(value) for value in self._values(seen.fetch)]
        foreseen.read = self._device.transfers.reading(wanted)
        foreseen.described = [described(as_tensor(v)) for v in self._values(seen.describe)]
        for handle in vectors.releases:
            self._overlay.pop(handle, None)
            self._freed.add(handle)
        self._store.hold_ahead(ran.values)
        self._ran.append(foreseen)

    def _bounds_of(self, template: Template) -> Bounds:
        bounds = self._bounds.get(template)
        if bounds is None:
            if len(self._bounds) >= MAX_PROGRAMS:
                self._bounds.clear()  # of templates that were evicted, most of them
            bounds = self._bounds[template] = Bounds(template)
        return bounds

    def _values(self, handles: Sequence[int]) -> list[Value]:
        """Raises ProtocolError for a handle that will have been freed, or whose value is on its way here."""
        overlay, freed = self._overlay, self._freed
        values: list[Value | None] = [overlay.get(h) for h in handles]
        bound = [h for h, v in zip(handles, values, strict=True) if v is None]
        if freed and not freed.isdisjoint(bound):
            raise _Unforeseeable("it uses what was freed")
        if self._store.awaits(bound):
            raise _Unforeseeable("it uses what is on its way from another server")
        found = iter(self._store.peek_all(bound))
        return [next(found) if v is None else v for v in values]


class _Unforeseeable(Exception):
    """The program cannot be run ahead, although it was foreseen."""


def _next(old: Sequence[int], new: Sequence[int]) -> list[int]:
    """Handles go on as they went on."""
    return [b + (b - a) for a, b in zip(old, new, strict=True)]
