"""When a session's programs were received, run and answered, while a client profiles it."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from time import perf_counter_ns
from typing import TYPE_CHECKING

from genie.wire.messages import RequestTrace

if TYPE_CHECKING:
    from genie.server.engine import Template

#: requests and op times that one session keeps at most until the client asks for them
MAX_KEPT = 500_000


class SessionTrace:
    """Counts the programs from 1 as they come, as their client does; times are `perf_counter_ns`.

    With ``ops`` each instruction is timed, ``synchronize`` being called after each. What comes
    after ``limit`` requests and op times were kept is counted in ``dropped``.
    """

    def __init__(self, ops: bool, limit: int, synchronize: Callable[[], None]) -> None:
        self.requests: list[RequestTrace] = []
        self.op_names: dict[str, list[str]] = {}
        self.dropped = 0
        self._limit = min(limit, MAX_KEPT)
        self._kept = 0
        self._number = 0
        self._synchronize = synchronize
        self.tick: Callable[[], None] | None = self._tick if ops else None

    def _tick(self) -> None:
        self._synchronize()
        self._stamps.append(perf_counter_ns())

    def received(self, nonce: str, first_sight: bool) -> int:
        """A program came; ``first_sight``: with its template's body. Returns its number."""
        self._stamps = array("q")
        self._started = self._ended = self._ops = 0
        self._digest = ""
        self._nonce, self._first_sight = nonce, first_sight
        self._number += 1
        self._received = perf_counter_ns()
        return self._number

    def executed(self, started: int, ended: int, template: Template) -> None:
        self._started, self._ended, self._ops = started, ended, template.n_ops
        self._digest = template.digest.hex()[:12]
        if self.tick is not None:
            self.op_names.setdefault(self._digest, template.names)

    def finished(self, failed: bool = False) -> None:
        """The program was answered, or run to its end where nobody waits for an answer."""
        if self._kept >= self._limit:
            self.dropped += 1
            return
        self._kept += 1 + len(self._stamps)
        self.requests.append(
            RequestTrace(
                number=self._number,
                nonce=self._nonce,
                first_sight=self._first_sight,
                failed=failed,
                ops=self._ops,
                template=self._digest,
                received_ns=self._received,
                started_ns=self._started,
                ended_ns=self._ended,
                finished_ns=perf_counter_ns(),
                op_ns=self._stamps.tobytes(),
            )
        )

    def take(self) -> tuple[list[RequestTrace], dict[str, list[str]], int]:
        """Requests, op names by template and number of dropped requests since the last call."""
        taken = self.requests, self.op_names, self.dropped
        self.requests, self.op_names, self.dropped, self._kept = [], {}, 0, 0
        return taken
