"""The servers of a run: started here, or running already at addresses that the user gave."""

from __future__ import annotations

import secrets
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from genie.device_facts import DeviceFacts, device_facts
from genie.devices import DeviceSlot
from genie.errors import ConfigError, ConnectError, ServerLostError

CONNECT_TIMEOUT_S = 5.0


class ServerPool(Protocol):
    """Addresses and token of the servers, and what is known of their processes."""

    @property
    def addresses(self) -> tuple[str, ...]: ...

    @property
    def token(self) -> str: ...

    @property
    def tls_ca(self) -> str | None:
        """PEM file of whom to trust for the servers; None where they do not speak TLS."""

    @property
    def pids(self) -> frozenset[int]:
        """Processes that a receipt may name; empty where they are not known."""

    def facts(self, count: int) -> list[DeviceFacts]:
        """What the devices of the first ``count`` servers are. Raises ConnectError, AuthError."""

    def require(self, count: int) -> tuple[str, ...]:
        """The first ``count`` addresses, all alive. Raises ServerLostError with a log tail, at once."""

    def log_tails(self) -> dict[str, str]:
        """Last lines of each server's log by address; empty for servers that were not started here."""

    def last_words(self) -> str:
        """Ends of the logs of the servers that have died, of all when none has; "" where unknown."""

    def close(self) -> None: ...


def with_logs(error: ServerLostError, pool: ServerPool) -> ServerLostError:
    """``error`` as it is when it brings a log, otherwise with the pool's."""
    return error if error.log_tail else ServerLostError(str(error), pool.last_words())


class StartedServers:
    """One server process per slot, started in parallel and killed by ``close``."""

    tls_ca = None

    def __init__(self, slots: Sequence[DeviceSlot], log_dir: Path, extra_args: Sequence[str] = ()) -> None:
        from genie.runtime.server_process import start_servers

        self.token = secrets.token_hex(16)
        self._slots = list(slots)
        self._servers = start_servers(list(slots), token=self.token, log_dir=log_dir, extra_args=extra_args)

    @property
    def addresses(self) -> tuple[str, ...]:
        return tuple(server.address for server in self._servers)

    @property
    def pids(self) -> frozenset[int]:
        return frozenset(server.pid for server in self._servers)

    def facts(self, count: int) -> list[DeviceFacts]:
        return [device_facts(slot) for slot in self._slots[:count]]

    def require(self, count: int) -> tuple[str, ...]:
        for server in self._servers[:count]:
            if not server.alive():
                raise ServerLostError(
                    f"server {server.address} (pid {server.pid}) has died: its cells cannot run; "
                    "see its log below, and start the run again",
                    server.log_tail(),
                )
        return self.addresses[:count]

    def log_tails(self) -> dict[str, str]:
        return {server.address: server.log_tail() for server in self._servers}

    def last_words(self) -> str:
        told = [server for server in self._servers if not server.alive()] or self._servers
        return "\n".join(
            f"[server {server.address}, pid {server.pid}]\n{server.log_tail()}" for server in told
        )

    def close(self) -> None:
        for server in self._servers:
            server.close()


class RunningServers:
    """Servers that someone else started. Their pids are known only when the starter passed them on."""

    def __init__(
        self, addresses: Sequence[str], token: str, pids: Sequence[int] = (), tls_ca: str | None = None
    ) -> None:
        self.tls_ca = tls_ca
        self.addresses = tuple(addresses)
        self.token = token
        self.pids = frozenset(pids)
        self._unreachable: dict[str, str] = {}
        self._facts: dict[str, DeviceFacts] = {}

    def facts(self, count: int) -> list[DeviceFacts]:
        for address in self.require(count):
            if address not in self._facts:
                self._facts[address] = self._asked(address)
        return [self._facts[address] for address in self.addresses[:count]]

    def _asked(self, address: str) -> DeviceFacts:
        from genie.runtime.connection import Connection

        with Connection.connect(address, self.token, tls_ca=self.tls_ca) as connection:
            return connection.welcome.facts

    def require(self, count: int) -> tuple[str, ...]:
        if count > len(self.addresses):
            raise ConfigError(
                f"{count} servers are needed, but only {len(self.addresses)} addresses were given"
            )
        for address in self.addresses[:count]:
            if address not in self._unreachable:
                host, _, port = address.rpartition(":")
                try:
                    socket.create_connection((host.strip("[]"), int(port)), CONNECT_TIMEOUT_S).close()
                    continue
                except OSError as error:
                    # Remembered: a host that swallows packets would cost each cell the whole time-out.
                    self._unreachable[address] = str(error)
            raise ConnectError(
                f"no server answers at {address} ({self._unreachable[address]}): start one with "
                "`genie serve`, or correct --genie-address"
            )
        return self.addresses[:count]

    def log_tails(self) -> dict[str, str]:
        return {}

    def last_words(self) -> str:
        return ""

    def close(self) -> None:
        """Nothing to do: who started these servers stops them."""
