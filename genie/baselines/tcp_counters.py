"""Bytes of TCP connections between two groups of processes, as the kernel counted them.

Works without root and without ``ss``. Sources (Linux uapi headers):

- ``linux/sock_diag.h``, ``linux/inet_diag.h``: ``SOCK_DIAG_BY_FAMILY``, ``inet_diag_req_v2``,
  ``inet_diag_msg`` and the ``INET_DIAG_INFO`` attribute (the same netlink dump that ``ss -tin`` reads);
- ``linux/tcp.h``: ``struct tcp_info``, of which ``tcpi_bytes_received``, ``tcpi_bytes_sent`` and
  ``tcpi_bytes_retrans`` (kernel 4.19 and later) are used. ``tcpi_bytes_acked`` is not: it counts the
  SYN of the side that connects, and lags behind by a delayed acknowledgement.

A socket belongs to a process when its inode is among ``/proc/<pid>/fd``. On one host both ends of a
connection are in the dump, so each end is counted by its own socket.
"""

from __future__ import annotations

import ipaddress
import os
import re
import socket
import struct
import time
from collections.abc import Collection
from dataclasses import dataclass

from genie.errors import MeasurementError, WireCountError

_NETLINK_SOCK_DIAG = 4
_SOCK_DIAG_BY_FAMILY = 20
_NLM_F_REQUEST_DUMP = 0x1 | 0x300
_NLMSG_ERROR = 2
_NLMSG_DONE = 3
_INET_DIAG_INFO = 2
# TCP_ESTABLISHED, FIN_WAIT1, FIN_WAIT2, CLOSE_WAIT, LAST_ACK, CLOSING: states with an owner and counters
_STATES = sum(1 << state for state in (1, 4, 5, 8, 9, 11))
_NLMSGHDR = struct.Struct("=IHHII")
_INET_DIAG_MSG_SIZE = 72
_TCPI_BYTES_RECEIVED = 128
_TCPI_BYTES_SENT = 200  # followed by tcpi_bytes_retrans
_TCP_INFO_NEEDED = _TCPI_BYTES_SENT + 16
_RECV_TIMEOUT_S = 5.0

Endpoint = tuple[str, int]


@dataclass(frozen=True)
class TcpSocket:
    """One end of a TCP connection. ``sent`` leaves retransmissions out; both are payload bytes."""

    cookie: int
    inode: int
    local: Endpoint
    remote: Endpoint
    sent: int
    received: int


@dataclass(frozen=True)
class EndBytes:
    """What one connection carried, seen from both of its ends (client's and server's socket)."""

    client_out: int = 0
    client_in: int = 0
    server_in: int = 0
    server_out: int = 0

    def __add__(self, other: EndBytes) -> EndBytes:
        return EndBytes(
            self.client_out + other.client_out,
            self.client_in + other.client_in,
            self.server_in + other.server_in,
            self.server_out + other.server_out,
        )

    def __sub__(self, other: EndBytes) -> EndBytes:
        return EndBytes(
            self.client_out - other.client_out,
            self.client_in - other.client_in,
            self.server_in - other.server_in,
            self.server_out - other.server_out,
        )

    @property
    def ends_agree(self) -> bool:
        return self.client_out == self.server_in and self.client_in == self.server_out


#: totals of each open connection of a link, by the cookies of its two sockets (never reused)
Snapshot = dict[tuple[int, int], EndBytes]


def tcp_sockets() -> list[TcpSocket]:
    """All connected TCP sockets of this network namespace, IPv4 and IPv6.

    Raises MeasurementError where the kernel does not serve ``NETLINK_SOCK_DIAG``.
    """
    return _dump(socket.AF_INET) + _dump(socket.AF_INET6)


def socket_inodes(pids: Collection[int]) -> set[int]:
    """Inodes of all sockets that the processes hold open. A process that has ended holds none."""
    inodes: set[int] = set()
    for pid in pids:
        folder = f"/proc/{pid}/fd"
        try:
            names = os.listdir(folder)
        except FileNotFoundError:
            continue
        except PermissionError as error:
            raise MeasurementError(
                f"cannot read the sockets of process {pid} ({error}): run the suite as the user who owns it"
            ) from error
        for name in names:
            try:
                target = os.readlink(f"{folder}/{name}")
            except FileNotFoundError:  # closed since listdir
                continue
            if match := re.fullmatch(r"socket:\[(\d+)\]", target):
                inodes.add(int(match[1]))
    return inodes


def snapshot(client_pids: Collection[int], server_pids: Collection[int]) -> Snapshot:
    """Totals of every connection with one end in ``client_pids`` and the other in ``server_pids``."""
    sockets = tcp_sockets()
    client, server = socket_inodes(client_pids), socket_inodes(server_pids)
    by_ends = {(s.local, s.remote): s for s in sockets}
    totals: Snapshot = {}
    for near in sockets:
        far = by_ends.get((near.remote, near.local))
        if far is None or near.inode not in client or far.inode not in server:
            continue
        totals[near.cookie, far.cookie] = EndBytes(near.sent, near.received, far.received, far.sent)
    return totals


def settled(
    client_pids: Collection[int], server_pids: Collection[int], quiet_s: float = 0.003, limit_s: float = 0.5
) -> Snapshot:
    """``snapshot`` once nothing moves any more: two equal readings whose two ends agree.

    After ``limit_s`` the last reading is returned as it is, so that a link that never falls silent
    shows up as ends that disagree and not as an error here.
    """
    deadline = time.monotonic() + limit_s
    last = snapshot(client_pids, server_pids)
    while time.monotonic() < deadline:
        # The kernel offers no event for "counter changed": reading again is the only way.
        time.sleep(quiet_s)
        now = snapshot(client_pids, server_pids)
        if now == last and all(end.ends_agree for end in now.values()):
            return now
        last = now
    return last


def moved(before: Snapshot, after: Snapshot) -> EndBytes:
    """Bytes between two snapshots. A connection opened since then counts from 0.

    Raises WireCountError when one was closed in between: its last bytes were never read.
    """
    closed = before.keys() - after.keys()
    if closed:
        raise WireCountError(
            f"{len(closed)} of {len(before)} connections of the link closed during the request, so its bytes "
            "are unknown: repeat the cell, and keep the pool's connections open"
        )
    total = EndBytes()
    for key, end in after.items():
        total += end - before.get(key, EndBytes())
    return total


def _dump(family: int) -> list[TcpSocket]:
    request = struct.pack("=BBBBI48x", family, socket.IPPROTO_TCP, 1 << (_INET_DIAG_INFO - 1), 0, _STATES)
    header = _NLMSGHDR.pack(_NLMSGHDR.size + len(request), _SOCK_DIAG_BY_FAMILY, _NLM_F_REQUEST_DUMP, 1, 0)
    found: list[TcpSocket] = []
    try:
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_SOCK_DIAG) as netlink:
            netlink.settimeout(_RECV_TIMEOUT_S)
            netlink.bind((0, 0))
            netlink.send(header + request)
            while not _read_messages(netlink.recv(1 << 18), family, found):
                pass
    except OSError as error:
        raise MeasurementError(
            f"this kernel gives no TCP byte counters over NETLINK_SOCK_DIAG ({error}): bytes on "
            "the wire of the peers cannot be measured here; load the module tcp_diag, or run on a host whose "
            "sandbox allows it"
        ) from error
    return found


def _read_messages(data: bytes, family: int, found: list[TcpSocket]) -> bool:
    """Appends the sockets in one netlink datagram; True when the dump is complete."""
    at = 0
    while at + _NLMSGHDR.size <= len(data):
        length, kind, _, _, _ = _NLMSGHDR.unpack_from(data, at)
        body = data[at + _NLMSGHDR.size : at + length]
        if kind == _NLMSG_DONE:
            return True
        if kind == _NLMSG_ERROR:
            code = -struct.unpack_from("=i", body)[0]
            raise OSError(code, os.strerror(code))
        # Inode 0: its process closed it (what waits for the far end's FIN has no counters any more).
        if _inode(body):
            found.append(_socket(body, family))
        at += (length + 3) & ~3
    return False


def _inode(body: bytes) -> int:
    inode: int = struct.unpack_from("=I", body, 68)[0]
    return inode


def _socket(body: bytes, family: int) -> TcpSocket:
    sport, dport = struct.unpack_from("!HH", body, 4)
    size = 4 if family == socket.AF_INET else 16
    cookie = struct.unpack_from("=Q", body, 44)[0]
    at = _INET_DIAG_MSG_SIZE
    while at + 4 <= len(body):
        length, kind = struct.unpack_from("=HH", body, at)
        if kind == _INET_DIAG_INFO and length - 4 >= _TCP_INFO_NEEDED:
            received = struct.unpack_from("=Q", body, at + 4 + _TCPI_BYTES_RECEIVED)[0]
            sent, again = struct.unpack_from("=QQ", body, at + 4 + _TCPI_BYTES_SENT)
            return TcpSocket(
                cookie,
                _inode(body),
                (_address(body[8 : 8 + size]), sport),
                (_address(body[24 : 24 + size]), dport),
                sent - again,
                received,
            )
        at += max(4, (length + 3) & ~3)
    raise MeasurementError(
        "the kernel's tcp_info has no tcpi_bytes_sent: byte counters of the peers need Linux 4.19 or later"
    )


def _address(raw: bytes) -> str:
    """Text form; an IPv4 address mapped into IPv6 (a dual-stack socket's) as plain IPv4."""
    address = ipaddress.ip_address(raw)
    mapped = getattr(address, "ipv4_mapped", None)
    return str(mapped or address)
