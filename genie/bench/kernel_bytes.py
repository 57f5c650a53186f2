"""What crossed this process's TCP sockets during a request, as the kernel counted it.

A baseline reports its own bytes; both ends of that report can be forged together. This is evidence
that no baseline can write: ``TCP_INFO`` of the sockets that this process holds, read by the harness
right before and right after ``Baseline.run``, outside the timer. It needs no privileges and nothing
of the servers, which may be on another host or belong to another user.

Why the comparison is exact for Genie's baselines, although programs may still be on their way:

- *Sent* is ``tcpi_bytes_sent - tcpi_bytes_retrans + tcpi_notsent_bytes``: all that was ever handed
  over to the socket, whether it has left already or waits for the window. Retransmissions count once.
  It equals what the ``send`` calls returned, which is what the client's connection counts.
- *Received* is ``tcpi_bytes_received``. When ``run`` returns every reply has been read (a program
  without reply brings its receipt with the next one), so the client's connection has counted the same.
- The exchange with which ``account`` asks the servers for their counters comes after the second
  reading, and the one of the request before came before the first.

Sources: ``linux/tcp.h`` (``struct tcp_info``; ``tcpi_bytes_sent`` since Linux 4.19), ``socket(7)``,
``tcp(7)``.
"""

from __future__ import annotations

import ctypes
import ipaddress
import os
import socket
import struct
import sys
from collections.abc import Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from genie.bench.receipts import slack_bytes
from genie.errors import MeasurementError, WireCountError

if TYPE_CHECKING:
    from genie.baselines.protocol import Wire
    from genie.bench.pool import ServerPool

#: remote baselines whose requests leave through sockets of other processes than this one (Ray's raylet)
OTHER_PROCESSES = frozenset({"ray"})
_SO_COOKIE = 57  # of SOL_SOCKET: names a socket for ever, where a descriptor is used again
_TCP_INFO_BYTES = 256
_TCPI_BYTES_RECEIVED = 128
_TCPI_NOTSENT_BYTES = 144
_TCPI_BYTES_SENT = 200  # followed by tcpi_bytes_retrans
_TCP_INFO_NEEDED = _TCPI_BYTES_SENT + 16
_SOCKADDR_BYTES = 128

_libc = ctypes.CDLL(None)

Endpoint = tuple[str, int]


@dataclass(frozen=True)
class SocketBytes:
    """Payload bytes of TCP connections, seen from this process."""

    sent: int = 0
    received: int = 0

    def __add__(self, other: SocketBytes) -> SocketBytes:
        return SocketBytes(self.sent + other.sent, self.received + other.received)

    def __sub__(self, other: SocketBytes) -> SocketBytes:
        return SocketBytes(self.sent - other.sent, self.received - other.received)


#: totals since each connection was opened, by the cookie of its socket
Reading = dict[int, SocketBytes]


class OwnSockets:
    """This process's TCP connections to ``addresses`` ("host:port"), or all of them when None."""

    def __init__(self, addresses: Collection[str] | None) -> None:
        self._endpoints = None if addresses is None else _endpoints(addresses)

    def read(self) -> Reading:
        """Totals of every connection that is open now.

        Raises MeasurementError where the kernel does not count the bytes that a socket sent.
        """
        reading: Reading = {}
        for descriptor, peer in _connections():
            if self._endpoints is None or peer in self._endpoints:
                reading[_cookie(descriptor)] = _counters(descriptor)
        return reading


def sockets_of(baseline: str, remote: bool, pool: ServerPool | None) -> OwnSockets | None:
    """The sockets that a baseline's requests must use; None where it sends nothing, or not from here.

    Genie's go to the servers of ``pool``. Of others it is not known whom they talk to, so every
    connection of this process counts, as it does for Genie where there is no pool.
    """
    if not remote or baseline in OTHER_PROCESSES:
        return None
    return OwnSockets(pool.addresses if pool is not None and baseline.startswith("genie_") else None)


def moved(before: Reading, after: Reading, where: str) -> SocketBytes:
    """Bytes between two readings. A connection opened since then counts from 0.

    Raises WireCountError when one was closed in between: its last bytes were never read.
    """
    closed = before.keys() - after.keys()
    if closed:
        raise WireCountError(
            f"{where}: {len(closed)} of {len(before)} connections to the servers closed during the request, "
            "so the kernel's count of its bytes is lost: keep a cell's connections open until its close()"
        )
    total = SocketBytes()
    for cookie, counted in after.items():
        total += counted - before.get(cookie, SocketBytes())
    return total


def check_kernel_bytes(counted: SocketBytes, wire: Wire, *, exact: bool, where: str) -> None:
    """Raises WireCountError when a baseline reports other bytes than its sockets carried."""
    for direction, claimed, real in (
        ("out", wire.bytes_out, counted.sent),
        ("in", wire.bytes_in, counted.received),
    ):
        if abs(claimed - real) > slack_bytes(real, exact=exact):
            raise WireCountError(
                f"{where}: the baseline reports {claimed} bytes {direction}, but the kernel counted {real} "
                "on this process's sockets: report what the sockets carried (a baseline whose requests leave "
                "from other processes belongs in genie.bench.kernel_bytes.OTHER_PROCESSES)"
            )


def _endpoints(addresses: Collection[str]) -> frozenset[Endpoint]:
    found = set()
    for address in addresses:
        host, _, port = address.rpartition(":")
        # A name that stands for nothing has no connections; a cell that uses it fails when it connects.
        with suppress(socket.gaierror):
            for answer in socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM):
                found.add((_plain(str(answer[4][0]).partition("%")[0]), int(port)))
    return frozenset(found)


def _connections() -> Iterator[tuple[int, Endpoint]]:
    """Descriptor and far end of each connected TCP socket of this process.

    Asked with plain system calls: a ``socket`` object made on a foreign descriptor would apply the
    process's default timeout to it, and so change how the connection's owner sees it.
    """
    for name in os.listdir("/proc/self/fd"):
        descriptor = int(name)
        # Fails for what is no socket, and for what was closed since it was listed.
        protocol = _option(descriptor, socket.SOL_SOCKET, socket.SO_PROTOCOL, 4)
        if protocol is None or struct.unpack("=i", protocol)[0] != socket.IPPROTO_TCP:
            continue
        peer = _peer(descriptor)
        if peer is not None:
            yield descriptor, peer


def _option(descriptor: int, level: int, name: int, size: int) -> bytes | None:
    buffer, length = ctypes.create_string_buffer(size), ctypes.c_uint32(size)
    failed = _libc.getsockopt(descriptor, level, name, buffer, ctypes.byref(length))
    return None if failed else buffer.raw[: length.value]


def _peer(descriptor: int) -> Endpoint | None:
    """None for a socket that is not connected, or no more."""
    buffer, length = ctypes.create_string_buffer(_SOCKADDR_BYTES), ctypes.c_uint32(_SOCKADDR_BYTES)
    if _libc.getpeername(descriptor, buffer, ctypes.byref(length)):
        return None
    family, port = struct.unpack_from("=H", buffer)[0], struct.unpack_from("!H", buffer, 2)[0]
    raw = buffer.raw[4:8] if family == socket.AF_INET else buffer.raw[8:24]
    return _plain(socket.inet_ntop(family, raw)), port


def _plain(address: str) -> str:
    """An IPv4 address mapped into IPv6 (a dual-stack socket's) as plain IPv4."""
    parsed = ipaddress.ip_address(address)
    return str(getattr(parsed, "ipv4_mapped", None) or parsed)


def _cookie(descriptor: int) -> int:
    raw = _option(descriptor, socket.SOL_SOCKET, _SO_COOKIE, 8)
    if raw is None:
        raise _uncounted()
    return int.from_bytes(raw, sys.byteorder)


def _counters(descriptor: int) -> SocketBytes:
    info = _option(descriptor, socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO_BYTES)
    if info is None or len(info) < _TCP_INFO_NEEDED:
        raise _uncounted()
    received = struct.unpack_from("=Q", info, _TCPI_BYTES_RECEIVED)[0]
    waiting = struct.unpack_from("=I", info, _TCPI_NOTSENT_BYTES)[0]
    sent, again = struct.unpack_from("=QQ", info, _TCPI_BYTES_SENT)
    return SocketBytes(sent - again + waiting, received)


def _uncounted() -> MeasurementError:
    return MeasurementError(
        "this kernel does not count the bytes of a socket (TCP_INFO without tcpi_bytes_sent), so what a "
        "remote baseline reports cannot be checked: run the client on Linux 4.19 or later, outside any "
        "sandbox that has a TCP of its own"
    )
