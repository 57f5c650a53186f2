"""Whether a profile is being taken now, and the spans that code adds to it.

Imports nothing of Genie, so that every layer may look at `active`. Read it through the module
(``spans.active``): a name imported from here would keep the value that it had at the import.
"""

from __future__ import annotations

import threading
from contextlib import AbstractContextManager, nullcontext
from time import perf_counter_ns
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

if TYPE_CHECKING:
    from genie.frontend.session import Session
    from genie.profiling.recording import Recording

#: what `genie.profile` is filling now; None outside its block
active: Recording | None = None
#: every session of this process that is in use somewhere: a profile starts with those that are open
sessions: WeakSet[Session] = WeakSet()

_NOTHING: AbstractContextManager[None] = nullcontext()


def span(name: str, **details: Any) -> AbstractContextManager[None]:
    """A span on the calling thread's track while a profile is active, else nothing at all.

    ``details`` must be JSON: they are shown when the span is clicked. Spans of one thread nest as
    their ``with`` blocks do.
    """
    recording = active
    return _NOTHING if recording is None else _Span(recording, name, details)


class _Span(AbstractContextManager[None]):
    def __init__(self, recording: Recording, name: str, details: dict[str, Any]) -> None:
        self._recording, self._name, self._details = recording, name, details

    def __enter__(self) -> None:
        self._start = perf_counter_ns()

    def __exit__(self, *exc: object) -> None:
        thread = threading.current_thread()
        track = f"thread {thread.name} ({thread.native_id})"
        self._recording.add(track, self._name, self._start, perf_counter_ns(), self._details)
