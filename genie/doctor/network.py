"""Ports on loopback, and the kernel's byte counters of TCP connections."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator

from genie.doctor.findings import Finding, Request, ok, problem

HOST = "127.0.0.1"
MESSAGE = b"x" * 1000


def check_ports(request: Request) -> Iterator[Finding]:
    with socket.create_server((HOST, 0)) as listening:
        yield ok("ports", f"can listen on {HOST} (the kernel chose {listening.getsockname()[1]})")
    if request.port is None:
        return
    name = f"port {request.port}"
    try:
        socket.create_server((HOST, request.port)).close()
    except PermissionError as error:
        yield problem(name, f"not allowed: {error.strerror}", "choose a port of 1024 or above")
    except OSError as error:
        yield problem(
            name,
            f"cannot listen on {HOST}:{request.port}: {error.strerror}; {_holder(request.port)}",
            "stop that process, or choose another port (--port 0 lets the kernel choose)",
        )
    else:
        yield ok(name, f"free on {HOST}")


def check_tcp_counters(request: Request) -> Iterator[Finding]:
    """One message over a connection of this process with itself, found in the kernel's counters."""
    from genie.baselines.tcp_counters import settled

    with (
        socket.create_server((HOST, 0)) as listening,
        socket.create_connection(listening.getsockname()) as near,
        listening.accept()[0] as far,
    ):
        near.sendall(MESSAGE)
        far.recv(len(MESSAGE), socket.MSG_WAITALL)
        totals = [
            end for end in settled([os.getpid()], [os.getpid()]).values() if len(MESSAGE) in _counts(end)
        ]
    if totals and totals[0].ends_agree:
        yield ok("TCP byte counters", f"the kernel counted {len(MESSAGE)} bytes at both ends")
    else:
        yield problem(
            "TCP byte counters",
            f"{len(MESSAGE)} bytes were sent between two sockets, but the kernel's counters do not say so",
            "run on a kernel of 4.19 or later outside of a sandbox with its own TCP: the peers' bytes "
            "cannot be measured here",
        )


def _counts(end: object) -> tuple[int, ...]:
    return tuple(vars(end).values())


def _holder(port: int) -> str:
    import psutil

    try:
        listening = [
            one
            for one in psutil.net_connections(kind="tcp")
            if one.status == psutil.CONN_LISTEN and one.laddr.port == port
        ]
        pids = sorted({one.pid for one in listening if one.pid is not None})
        if pids:
            return "held by " + ", ".join(f"{psutil.Process(pid).name()} (pid {pid})" for pid in pids)
    except psutil.Error as error:
        return f"who holds it cannot be told ({error})"
    if listening:
        return f"held by a process of another user (root sees it: ss -ltnp 'sport = :{port}')"
    return "nobody listens there: it is in use by a connection, or reserved"
