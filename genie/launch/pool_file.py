"""The file in which servers that an engine has started tell their clients where they are.

It holds no token: who can read it learns addresses, and can do nothing with them.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from genie.errors import ConfigError, ConnectError

#: before a path, where an address is expected: "@pool.json"
PREFIX = "@"
WAIT_SECONDS = 60.0
_POLL_SECONDS = 0.1


@dataclass(frozen=True)
class PoolFile:
    """One entry per server, by rank. ``addresses``: "host:port"; ``devices``: as in a receipt ("cpu:0
    AMD EPYC 9654"); ``pids``: on the server's host; ``hosts``: host names, for the reader of a log."""

    addresses: tuple[str, ...]
    devices: tuple[str, ...]
    pids: tuple[int, ...]
    hosts: tuple[str, ...]

    def __post_init__(self) -> None:
        lengths = {len(getattr(self, field.name)) for field in fields(self)}
        if len(lengths) != 1 or 0 in lengths:
            raise ConfigError("a pool names as many devices, pids and hosts as addresses, and at least one")


def write_pool(path: Path, pool: PoolFile) -> None:
    """Readers see the whole file or none. Raises ConfigError where the folder cannot be written."""
    try:
        descriptor, name = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
        try:
            with os.fdopen(descriptor, "w") as out:
                json.dump(asdict(pool), out, indent=1)
                out.write("\n")
                out.flush()
                os.fsync(out.fileno())  # another host may read it over a network file system
            os.replace(name, path)
        except BaseException:
            os.unlink(name)
            raise
    except OSError as error:
        raise ConfigError(
            f"cannot write the pool file {path} ({error.strerror}): name a file in a folder that exists and "
            "that clients can read"
        ) from error


def remove_pool(path: Path, pool: PoolFile | None = None) -> None:
    """Removes the file, or only where it still says ``pool``: a later pool's file stays."""
    try:
        if pool is None or _parsed(path) == pool:
            path.unlink(missing_ok=True)
    except FileNotFoundError:
        return  # who started a new pool there has removed it already
    except OSError as error:
        raise ConfigError(f"cannot remove the old pool file {path} ({error.strerror}): remove it") from error


def read_pool(path: Path, wait_s: float = WAIT_SECONDS) -> PoolFile:
    """The pool that ``path`` names, which is there only when all servers are ready.

    Waits up to ``wait_s`` seconds for the file. Raises ConnectError when it does not come, ConfigError for
    a file that names no pool.
    """
    deadline = time.monotonic() + wait_s
    while True:
        try:
            return _parsed(path)
        except FileNotFoundError:
            if time.monotonic() > deadline:
                raise ConnectError(
                    f"no pool file {path} within {wait_s:g} s: start the servers with `genie serve --pool "
                    f"{path}` under torchrun or srun, on a file system that this host shares, or wait longer"
                ) from None
        except OSError as error:
            raise ConfigError(f"cannot read the pool file {path}: {error.strerror}") from error
        time.sleep(_POLL_SECONDS)


def _parsed(path: Path) -> PoolFile:
    text = path.read_text()
    try:
        told = json.loads(text)
        if not all(isinstance(pid, int) for pid in told["pids"]):
            raise TypeError("pids")
        return PoolFile(
            addresses=tuple(_address(each) for each in told["addresses"]),
            devices=tuple(map(str, told["devices"])),
            pids=tuple(told["pids"]),
            hosts=tuple(map(str, told["hosts"])),
        )
    except (ValueError, KeyError, TypeError, ConfigError) as error:
        raise ConfigError(
            f"{path} is no pool file ({type(error).__name__}: {error}): name the file that `genie serve "
            "--pool` writes"
        ) from None


def _address(text: object) -> str:
    host, _, port = str(text).rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ValueError(f"{text!r} is not host:port")
    return str(text)
