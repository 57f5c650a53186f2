"""Executors that run programs on servers, and `connect`."""

from __future__ import annotations

import os
from collections.abc import Callable

from torch import Tensor

from genie.errors import ConfigError
from genie.frontend.program import Outcome, Program
from genie.frontend.session import Session
from genie.runtime.connection import Connection, fetched_tensors
from genie.runtime.link import ServerLink, inline_inputs
from genie.wire.auth import TOKEN_VARIABLE

INLINE_BYTES = 64 << 10
#: long enough to be cheap to send, short enough that the server starts early on a step of some hundred ops
CHUNK = 128


class ResidentExecutor:
    """Everything lives on one server: weights are sent once, results stay, only what is read returns.

    A program whose results nobody waits for is sent quietly: the server works on it while the client
    goes on recording, and its receipt or error comes with the next reply that is waited for.
    """

    inline_bytes = INLINE_BYTES
    chunk = CHUNK

    def __init__(self, link: ServerLink) -> None:
        self.link = link
        self.links = (link,)

    def upload(self, handle: int, tensor: Tensor, is_parameter: bool) -> None:
        self.link.upload(handle, tensor, is_parameter)

    def execute(self, program: Program, fetch: list[int], describe: list[int]) -> Outcome:
        link = self.link
        inputs, buffers, owners = inline_inputs(program)
        request = link.message(
            program,
            program.release,
            inputs=inputs,
            fetch=fetch,
            describe=describe,
            quiet=not (fetch or describe or program.fresh),
        )
        link.timings.capture += program.capture_s
        link.send(request, buffers)
        del owners
        if request.quiet:
            return Outcome()
        result, payload = link.receive()
        fetched = fetched_tensors(result, payload) if fetch else []
        return Outcome(fetched, result.described, result.relayouts, result.receipt)

    def close(self) -> None:
        self.link.close()


def connect(
    address: str,
    token: str | None = None,
    *,
    timeout: float = 10.0,
    tls_ca: str | None = None,
    log_tail: Callable[[], str] | None = None,
    replay: bool = False,
) -> Session:
    """A session on the server at ``address`` ("host:port"). Use as a context manager.

    ``token`` defaults to the environment's GENIE_TOKEN; ``timeout`` is in seconds.
    ``replay``: see `Session`. Raises ConnectError, AuthError.
    """
    link = open_link(address, token, timeout=timeout, tls_ca=tls_ca, log_tail=log_tail)
    return Session(ResidentExecutor(link), replay=replay)


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
