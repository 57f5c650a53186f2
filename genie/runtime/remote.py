"""Executors that run programs on servers, and `connect`."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from torch import Tensor

from genie.config import POOL_FEATURES
from genie.errors import ConfigError
from genie.frontend.program import Outcome, Program
from genie.frontend.session import Session
from genie.launch.pool_file import PREFIX, read_pool
from genie.runtime.connection import Connection, fetched_tensors
from genie.runtime.link import ServerLink, inline_inputs
from genie.runtime.open_pool import open_pool
from genie.scheduler.problem import Policy
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
    address: str | Sequence[str],
    token: str | None = None,
    *,
    timeout: float = 10.0,
    tls_ca: str | None = None,
    log_tail: Callable[[], str] | None = None,
    replay: bool = False,
    engines: Collection[str] = (),
    run_ahead: int = 0,
    features: Collection[str] = POOL_FEATURES,
    policies: Sequence[Policy] | None = None,
    calibrate: bool = True,
) -> Session:
    """A session on the server at ``address`` ("host:port"), or on a pool. Use as a context manager.

    A pool: a sequence of addresses, one string with commas between them, or "@FILE" for a file that
    ``genie serve --pool FILE`` wrote. Then each window of operations is planned: ``features`` are those of
    `genie.config.POOL_FEATURES` that are on, ``policies`` replace the built-in ones. ``calibrate``: measure
    a device that has no stored calibration (once, for seconds); False: plan with nominal rates.
    ``token`` defaults to the environment's GENIE_TOKEN; ``timeout`` is in seconds.
    ``replay``: see `Session`. ``engines``: of `genie.config.ENGINES`, those that the servers may run programs
    with beside op by op. ``run_ahead``: what the servers may run before it is asked for, in windows between
    two reads (0 or 1). Neither changes a result. Raises ConnectError, AuthError, ConfigError.
    """
    addresses = addresses_of(address)
    links: list[ServerLink] = []
    try:
        for one in addresses:
            link = open_link(one, token, timeout=timeout, tls_ca=tls_ca, log_tail=log_tail)
            links.append(link)
            link.configure(engines, run_ahead)
        if len(links) == 1 and policies is None:
            return Session(ResidentExecutor(links[0]), replay=replay)
        costs = None
        if calibrate and "cost_model" in features and len(links) > 1:
            from genie.cost.pool import pool_costs  # it opens sessions, too

            costs = pool_costs(addresses, token, tls_ca=tls_ca)
        return Session(open_pool(links, features=features, policies=policies, costs=costs), replay=replay)
    except BaseException:
        for link in links:
            link.close()
        raise


def addresses_of(address: str | Sequence[str]) -> list[str]:
    """The servers that ``address`` names; see `connect`. Raises ConfigError."""
    if isinstance(address, str):
        if address.startswith(PREFIX):
            return list(read_pool(Path(address.removeprefix(PREFIX))).addresses)
        address = [part.strip() for part in address.split(",")]
    if not address or not all(address):
        raise ConfigError("no server address given: write host:port, several with commas between them")
    return list(address)


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
