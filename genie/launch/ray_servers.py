"""A pool whose servers Ray starts, on a cluster that runs already: one actor per server."""

from __future__ import annotations

import json
import os
import secrets
import time
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from genie import errors
from genie.device_facts import DeviceFacts
from genie.errors import ConfigError, ConnectError, ServerLostError
from genie.launch.bind import Bind
from genie.runtime.child_process import ChildProcess
from genie.runtime.connection import Connection

START_SECONDS = 180.0
_ANSWER_SECONDS = 30.0
_CLOSE_SECONDS = 30.0


class RayServers:
    """The pool of `genie.bench.pool.ServerPool`, started by actors and gone with `close`, or this process.

    Make it in a thread that outlives it. ``address``: of the cluster ("auto": RAY_ADDRESS, or the one of
    this host). ``strategy``: of the placement group. All on this host: they listen on loopback. Otherwise
    each listens on its node's address, for which ``bind`` must say how.

    Raises ConfigError, ConnectError, AuthError.
    """

    def __init__(
        self,
        count: int,
        device_type: str,
        log_dir: Path,
        *,
        address: str = "auto",
        strategy: str = "SPREAD",
        bind: Bind | None = None,
        start_timeout_s: float = START_SECONDS,
    ) -> None:
        bind = bind or Bind()
        self.token = secrets.token_hex(16)
        self.tls_ca = bind.ca
        self._facts: dict[str, DeviceFacts] = {}
        log_dir.mkdir(parents=True, exist_ok=True)
        self._driver = _Driver(log_dir / f"ray-driver-{os.getpid()}-{time.monotonic_ns()}.log")
        try:
            told = self._driver.ask(
                {
                    "count": count, "device_type": device_type, "address": address, "strategy": strategy,
                    "bind": asdict(bind), "seconds": start_timeout_s, "token": self.token,
                    "threads": os.environ.get("OMP_NUM_THREADS"),
                },
                start_timeout_s + _ANSWER_SECONDS,
            )  # fmt: skip
            if "error" in told:
                raise _raised(told)
        except BaseException:
            self.close()
            raise
        self._servers: list[dict[str, Any]] = told["servers"]

    @property
    def addresses(self) -> tuple[str, ...]:
        return tuple(server["address"] for server in self._servers)

    @property
    def pids(self) -> frozenset[int]:
        return frozenset(server["pid"] for server in self._servers)

    def facts(self, count: int) -> list[DeviceFacts]:
        for address in self.require(count):
            if address not in self._facts:
                with Connection.connect(address, self.token, tls_ca=self.tls_ca) as connection:
                    self._facts[address] = connection.welcome.facts
        return [self._facts[address] for address in self.addresses[:count]]

    def require(self, count: int) -> tuple[str, ...]:
        """See `ServerPool.require`. Asks the actors, wherever they are."""
        if count > len(self._servers):
            raise ConfigError(f"{count} servers are needed, but Ray has started {len(self._servers)}")
        for server, (alive, tail) in zip(self._servers[:count], self._state(), strict=False):
            if not alive:
                raise ServerLostError(
                    f"server {server['address']} (pid {server['pid']} on {server['host']}) has died: its "
                    "cells cannot run; see its log below, and start the run again",
                    tail,
                )
        return self.addresses[:count]

    def log_tails(self) -> dict[str, str]:
        return dict(zip(self.addresses, (tail for _, tail in self._state()), strict=True))

    def last_words(self) -> str:
        try:
            told = list(zip(self._servers, self._state(), strict=True))
        except ServerLostError as error:
            return error.log_tail
        told = [(server, state) for server, state in told if not state[0]] or told
        return "\n".join(
            f"[server {server['address']}, pid {server['pid']}]\n{tail}" for server, (_, tail) in told
        )

    def close(self) -> None:
        """Ends servers and actors, and frees what Ray had reserved. May be called twice."""
        self._driver.stop(grace_s=_CLOSE_SECONDS)

    def _state(self) -> list[tuple[bool, str]]:
        try:
            return [(alive, tail) for alive, tail in self._driver.ask("state", _ANSWER_SECONDS)["state"]]
        except ConnectError as error:
            raise ServerLostError(
                "the Ray driver of the servers is gone, and the servers with it: see whether the Ray cluster "
                "is still up, and start the run again",
                error.log_tail,
            ) from error


class _Driver(ChildProcess):
    """`genie.launch.ray_driver`, and the conversation with it."""

    def __init__(self, log: Path) -> None:
        super().__init__("genie.launch.ray_driver", [], log, {})

    def ask(self, question: object, timeout_s: float) -> dict[str, Any]:
        """One line there, one line back. Raises ConnectError when none comes in time."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # it has ended: reading its answer says why
            self._process.stdin.write((json.dumps(question) + "\n").encode())
            self._process.stdin.flush()
        return dict(self.wait_ready(timeout_s))


def _raised(told: dict[str, str]) -> Exception:
    kind = getattr(errors, told["error"])
    if issubclass(kind, errors.RemoteError):
        return kind(told["message"], told["log_tail"])
    return kind(told["message"])
