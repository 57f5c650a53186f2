"""CUDA graphs of specialised programs: captured once for fixed addresses, then replayed in one launch.

Weights are read where they are; other externals are copied into buffers of the graph, results out of it.
All sessions of a server share one pool: a program with the same weights, sizes and literals is captured once.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from genie.server.engines.emit import Run
from genie.server.engines.inductor import Compiler
from genie.server.engines.kv import Buffers
from genie.server.faults import is_device_lost

log = logging.getLogger("genie.server")

#: of the device's memory that graphs may hold, with their buffers
SHARE_OF_MEMORY = 0.25
#: graphs of one program, for as many generations at a time
MOST_ALIKE = 8


Call = Callable[[], list[Tensor | None]]
Replay = Callable[[], None]
Capture = Callable[[Call], tuple[Replay, list[Tensor | None], int]]


class CaptureError(Exception):
    """The device could not capture the program; the message says why."""


class Instance:
    """A captured program with its buffers."""

    def __init__(
        self, run: Run, args: Sequence[Tensor], inputs: Sequence[Tensor], buffers: Buffers | None,
        masks: Sequence[Tensor], position: Tensor | None, capture: Capture,
    ) -> None:  # fmt: skip
        """``args``: the placeholders' values in order, among them ``inputs`` and ``position``, which are
        written to before each replay, and ``masks``, which the caller writes to. Raises CaptureError, or
        torch's OutOfMemoryError."""
        self.buffers, self.masks, self.inputs, self.position = buffers, masks, inputs, position
        self.compiled = False  # its run is (see `genie.server.engines.inductor`)
        self.program: object = None  # that uses it now
        self.used = time.monotonic()
        self._replay, self._outputs, taken = capture(lambda: run(list(args)))
        held = sum(t.nbytes for t in inputs) + (buffers.nbytes if buffers is not None else 0)
        self.nbytes = taken + held
        self._groups = _by_storage(self._outputs)

    @property
    def busy(self) -> bool:
        """A state lives in its buffers."""
        return self.buffers is not None and self.buffers.length > 0

    def replay(self, inputs: Sequence[Tensor], position: int = 0) -> list[Tensor | None]:
        """Values of its own for what the program keeps. Nothing is waited for."""
        self.used = time.monotonic()
        for mine, given in zip(self.inputs, inputs, strict=True):
            mine.copy_(given)
        if self.position is not None:
            self.position.fill_(position)
        self._replay()
        return self._copies()

    def _copies(self) -> list[Tensor | None]:
        values: list[Tensor | None] = [None] * len(self._outputs)
        alone: list[tuple[Tensor, Tensor]] = []  # these are copied in one launch
        for members in self._groups:
            outputs: list[Tensor] = [self._outputs[k] for k in members]  # type: ignore[misc]
            first = outputs[0]
            if len(members) == 1 and first.nbytes == first.untyped_storage().nbytes():
                values[members[0]] = copy = torch.empty_strided(
                    first.shape, first.stride(), dtype=first.dtype, device=first.device
                )
                alone.append((copy, first))
                continue
            for k, value in zip(members, _copied(outputs), strict=True):
                values[k] = value
        if alone:
            torch._foreach_copy_([copy for copy, _ in alone], [output for _, output in alone])
        return values


def _by_storage(outputs: Sequence[Tensor | None]) -> list[list[int]]:
    groups: dict[int, list[int]] = {}
    for k, value in enumerate(outputs):
        if value is not None:
            groups.setdefault(value.untyped_storage()._cdata, []).append(k)
    return list(groups.values())


def _copied(values: list[Tensor]) -> list[Tensor]:
    """Copies that share memory among each other as the values do."""
    first = values[0]
    flat = torch.empty(0, dtype=torch.uint8, device=first.device).set_(first.untyped_storage())
    storage = flat.clone().untyped_storage()
    return [
        torch.empty(0, dtype=v.dtype, device=v.device).set_(storage, v.storage_offset(), v.shape, v.stride())
        for v in values
    ]


def captured(call: Call) -> tuple[Replay, list[Tensor | None], int]:
    """A CUDA graph of the call: what replays it, what it returns each time, and the bytes that it holds.

    Raises CaptureError, or torch's OutOfMemoryError."""
    current, side = torch.cuda.current_stream(), torch.cuda.Stream()
    before = torch.cuda.memory_reserved()
    side.wait_stream(current)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.stream(side):
            call()  # libraries allocate and choose kernels in their first call
            side.synchronize()
            # Other sessions' threads may allocate meanwhile.
            graph.capture_begin(capture_error_mode="thread_local")
            try:
                outputs = call()
            except BaseException:
                with contextlib.suppress(RuntimeError):
                    graph.capture_end()
                raise
            graph.capture_end()
    except torch.cuda.OutOfMemoryError:
        raise
    except RuntimeError as exc:
        if is_device_lost(exc):
            raise
        raise CaptureError(str(exc).splitlines()[0]) from exc
    finally:
        current.wait_stream(side)
    return graph.replay, outputs, max(0, torch.cuda.memory_reserved() - before)


def repeated(call: Call) -> tuple[Replay, list[Tensor | None], int]:
    """The same on a device without graphs: runs the call each time, into the same results."""
    outputs = call()

    def replay() -> None:
        for old, new in zip(outputs, call(), strict=True):
            if old is not None and new is not None:
                old.copy_(new)

    return replay, outputs, sum(v.nbytes for v in outputs if v is not None)


class GraphPool:
    """A server's instances, by what they compute. Not thread-safe: used under the device's lock."""

    def __init__(self, limit: int, capture: Capture = captured, compiler: Compiler | None = None) -> None:
        """``limit``: bytes that all instances may hold together. ``compiler``: of programs for sessions that
        allow it; None on a CPU, where it would take the requests' cores."""
        self.limit = limit
        self.capture = capture
        self.compiler = compiler
        self._instances: dict[Any, list[Instance]] = {}

    @property
    def nbytes(self) -> int:
        return sum(i.nbytes for alike in self._instances.values() for i in alike)

    def __len__(self) -> int:
        return sum(map(len, self._instances.values()))

    def find(self, key: Any) -> Instance | None:
        """One that is free."""
        return next((i for i in self._instances.get(key, ()) if not i.busy), None)

    def add(self, key: Any, make: Callable[[], Instance]) -> Instance:
        """Makes one, evicting those used last longest ago. Raises CaptureError, also where
        those in use would be over the limit, and OutOfMemoryError."""
        if len(self._instances.get(key, ())) >= MOST_ALIKE:
            raise CaptureError(f"{MOST_ALIKE} generations use this program at the time")
        instance: Instance | None = None
        try:
            instance = make()
        except torch.cuda.OutOfMemoryError:
            if not self._evict_all_free():
                raise
        if instance is None:  # once more, when nothing of the first attempt is held any longer
            torch.cuda.empty_cache()
            instance = make()
        needed = instance.nbytes + sum(i.nbytes for same in self._instances.values() for i in same if i.busy)
        if needed > self.limit:
            raise CaptureError(f"graphs in use would hold {needed} bytes, over their limit of {self.limit}")
        self._instances.setdefault(key, []).append(instance)
        while self.nbytes > self.limit and self._evict_oldest(but=instance):
            pass
        return instance

    def drop(self, key: Any) -> bool:
        """Lets go of those that are free. Whether none is left."""
        for instance in [i for i in self._instances.get(key, ()) if not i.busy]:
            self._remove(key, instance)
        return key not in self._instances

    def _free(self, but: Instance | None = None) -> list[tuple[float, Any, Instance]]:
        return [
            (i.used, key, i)
            for key, alike in self._instances.items()
            for i in alike
            if not i.busy and i is not but
        ]

    def _evict_oldest(self, but: Instance) -> bool:
        free = self._free(but)
        if free:
            _, key, instance = min(free, key=lambda f: f[0])
            self._remove(key, instance)
        return bool(free)

    def _evict_all_free(self) -> bool:
        free = self._free()
        for _, key, instance in free:
            self._remove(key, instance)
        return bool(free)

    def _remove(self, key: Any, instance: Instance) -> None:
        self._instances[key].remove(instance)
        if not self._instances[key]:
            del self._instances[key]
