"""Executors that run programs on servers, and `connect`."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable

from torch import Tensor

from genie.errors import ConfigError
from genie.frontend.program import Outcome, Program
from genie.frontend.session import Session
from genie.runtime.connection import Connection, fetched_tensors
from genie.runtime.link import ServerLink, inline_inputs, int64s
from genie.wire.auth import TOKEN_VARIABLE

MAX_OUTSTANDING = 16
INLINE_BYTES = 64 << 10


class ResidentExecutor:
    """Everything lives on one server: weights are sent once, results stay, only what is read returns.

    A program whose results nobody waits for is sent without waiting; its error, if any, comes with
    the next reply that is waited for.
    """

    inline_bytes = INLINE_BYTES

    def __init__(self, link: ServerLink) -> None:
        self.link = link
        self.links = (link,)
        self._waiting: deque[Program] = deque()

    def upload(self, handle: int, tensor: Tensor, is_parameter: bool) -> None:
        self._drain()
        self.link.upload(handle, tensor, is_parameter)

    def execute(self, program: Program, fetch: list[int], describe: list[int]) -> Outcome:
        link = self.link
        inputs, buffers, owners = inline_inputs(program)
        request = link.message(
            program, inputs=inputs, fetch=fetch, describe=describe, release_after=int64s(program.release)
        )
        link.timings.capture += program.capture_s
        link.send(request, buffers)
        del owners
        if not fetch and not describe and not program.fresh and len(self._waiting) < MAX_OUTSTANDING:
            self._waiting.append(program)
            return Outcome()
        self._drain()
        result, payload = link.receive()
        fetched = fetched_tensors(result, payload) if fetch else []
        return Outcome(fetched, result.described, result.relayouts, result.receipt)

    def _drain(self) -> None:
        """Reads the replies to programs that nobody has waited for yet."""
        while self._waiting:
            self._waiting.popleft()
            self.link.receive()

    def close(self) -> None:
        self._waiting.clear()
        self.link.close()


def connect(
    address: str,
    token: str | None = None,
    *,
    timeout: float = 10.0,
    tls_ca: str | None = None,
    log_tail: Callable[[], str] | None = None,
) -> Session:
    """A session on the server at ``address`` ("host:port"). Use as a context manager.

    ``token`` defaults to the environment's GENIE_TOKEN; ``timeout`` is in seconds.
    Raises ConnectError, AuthError.
    """
    return Session(
        ResidentExecutor(open_link(address, token, timeout=timeout, tls_ca=tls_ca, log_tail=log_tail))
    )


def open_link(
    address: str,
    token: str | None = None,
    *,
    timeout: float = 10.0,
    tls_ca: str | None = None,
    log_tail: Callable[[], str] | None = None,
) -> ServerLink:
    if token is None:
        token = os.environ.get(TOKEN_VARIABLE)
    if not token:
        raise ConfigError(
            f"no token for {address}: pass token=..., or set {TOKEN_VARIABLE} to the server's token"
        )
    return ServerLink(Connection.connect(address, token, timeout=timeout, tls_ca=tls_ca, log_tail=log_tail))
