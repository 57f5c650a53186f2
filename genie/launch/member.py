"""``genie serve --pool FILE``: one server of a pool whose processes torchrun or srun has started.

The members meet at a ``torch.distributed`` store, which knows no password: like the rest of that
library it is for a trusted network. Addresses go through it; the token does not.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from torch import distributed as dist

from genie.devices import DeviceSlot, available_cores, device_slot, resolve_device_type
from genie.errors import ConfigError, ConnectError
from genie.launch.pool_file import PoolFile, remove_pool, write_pool
from genie.launch.rank import Rank
from genie.wire.auth import is_loopback

if TYPE_CHECKING:
    from genie.server.process import ServeOptions

JOIN_SECONDS = 300.0
AUTO_HOST = "auto"
_POLL_SECONDS = 0.05
_LEAVE_SECONDS = 30.0


class Member:
    """This process's part in its pool. Make it before the server binds."""

    def __init__(self, rank: Rank, pool: Path, join_s: float = JOIN_SECONDS) -> None:
        self._rank = rank
        self._path = pool
        self._join_s = join_s
        self._written: PoolFile | None = None
        if rank.rank == 0:
            remove_pool(pool)  # of an earlier pool: clients would dial servers that are gone

    @property
    def dies_with_starter(self) -> bool:
        """srun's daemon ends its tasks itself; torchrun leaves them behind when it is killed."""
        return self._rank.engine == "torchrun"

    def placed(self, options: ServeOptions) -> ServeOptions:
        """``options`` with this rank's device, cores and (for `AUTO_HOST`) address.

        Raises ConfigError for a numbered device, and for one that is not there.
        """
        kind, _, number = options.device.partition(":")
        if number:
            raise ConfigError(
                f"--device {options.device}: with --pool the rank chooses the number; write {kind}"
            )
        slot = rank_slot(self._rank, resolve_device_type(kind))
        return replace(
            options,
            host=self._host(options.host),
            device=f"{slot.type}:{slot.index}",
            cores=slot.cores,
        )

    def _host(self, host: str) -> str:
        if host != AUTO_HOST:
            return host
        return "127.0.0.1" if self._rank.one_host else own_address(self._rank.master)

    def announce(self, address: str, device: str) -> None:
        """Returns when all members are ready and rank 0 has written the pool file.

        Raises ConnectError, naming the ranks that are missing after ``join_s`` seconds.
        """
        rank, deadline = self._rank, time.monotonic() + self._join_s
        if address.rpartition(":")[0].strip("[]") in ("0.0.0.0", "::"):
            raise ConfigError(
                f"a pool cannot tell its clients {address}: give --host an address, or {AUTO_HOST}"
            )
        try:
            store = self._store()
            told = {"address": address, "device": device, "pid": os.getpid(), "host": socket.gethostname()}
            store.set(f"member/{rank.rank}", json.dumps(told))
            if rank.rank:
                self._wait(store, ["written"], deadline)
                store.set(f"leaves/{rank.rank}", "1")
            else:
                names = [f"member/{each}" for each in range(rank.size)]
                self._wait(store, names, deadline)
                self._write([json.loads(store.get(name)) for name in names])
                store.set("written", "1")
                # The store may be this process's: it stays until all have read the line above, or died.
                leaves = [f"leaves/{each}" for each in range(1, rank.size)]
                self._missing(store, leaves, time.monotonic() + _LEAVE_SECONDS)
        except dist.DistError as error:
            raise ConnectError(
                f"rank {rank.rank} of {rank.size} does not reach the pool's store at {rank.master[0]}:"
                f"{rank.master[1]} ({str(error).splitlines()[0]}): check MASTER_ADDR and MASTER_PORT, that "
                "rank 0 runs, and that its port is free and not behind a firewall"
            ) from error

    def leave(self) -> None:
        """Removes the pool file that this process wrote, unless it is another pool's by now."""
        if self._written is not None:
            remove_pool(self._path, self._written)

    def _store(self) -> dist.Store:
        rank = self._rank
        host, port = rank.master
        store = dist.TCPStore(
            host,
            port,
            is_master=rank.rank == 0 and not rank.store_runs,
            timeout=timedelta(seconds=self._join_s),
            wait_for_workers=False,
        )
        return dist.PrefixStore(f"genie-pool-{rank.attempt}", store)

    def _wait(self, store: dist.Store, names: list[str], deadline: float) -> None:
        if missing := self._missing(store, names, deadline):
            raise ConnectError(
                f"rank {self._rank.rank}: the pool is not complete after {self._join_s:g} s, "
                f"{', '.join(missing)} did not come: see the other ranks' logs, then start all again"
            )

    @staticmethod
    def _missing(store: dist.Store, names: list[str], deadline: float) -> list[str]:
        """Keys that are still not there at ``deadline``; returns as soon as all are."""
        # By polling: a Store.wait of several keys does not say which of them did not come.
        while names and not store.check(names):
            if time.monotonic() > deadline:
                return [name for name in names if not store.check([name])]
            time.sleep(_POLL_SECONDS)
        return []

    def _write(self, members: list[dict[str, object]]) -> None:
        def column(name: str, kind: Callable[[object], object]) -> tuple:
            return tuple(kind(member[name]) for member in members)

        pool = PoolFile(
            addresses=column("address", str),
            devices=column("device", str),
            pids=column("pid", lambda pid: pid),
            hosts=column("host", str),
        )
        write_pool(self._path, pool)
        self._written = pool


def rank_slot(rank: Rank, device_type: str) -> DeviceSlot:
    """The device of this rank: slot ``local_rank``, or what the engine has given to it alone.

    Raises ConfigError for a GPU that is not there.
    """
    if device_type == "cuda":
        return device_slot("cuda", 0 if rank.own_gpu else rank.local_rank)
    if rank.own_cores:
        return DeviceSlot("cpu", rank.local_rank, available_cores())
    return device_slot("cpu", rank.local_rank)


def own_address(peer: tuple[str, int]) -> str:
    """This host's address on the way to ``peer``; no packet is sent. Raises ConnectError."""
    try:
        family, _, _, _, address = socket.getaddrinfo(*peer, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(address)
            own = str(probe.getsockname()[0])
    except OSError as error:
        raise ConnectError(
            f"no way from this host to {peer[0]} ({error.strerror}): correct MASTER_ADDR, or give --host the "
            "address that clients shall use"
        ) from error
    if is_loopback(own) and not is_loopback(peer[0]):
        # Rank 0's own name often stands for 127.0.1.1 in /etc/hosts, which no other host can dial.
        raise ConnectError(
            f"{peer[0]} is {own} for this host: give --host the address that clients shall use, or set "
            "MASTER_ADDR to the address of rank 0's host"
        )
    return own
