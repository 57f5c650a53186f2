"""Hosts for tests: network namespaces of this machine, each with an address of its own, on one bridge.

Processes in them share the disk, the cores and the clock, but reach each other by their addresses only:
what listens on the loopback of one is not there for another.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import pytest

_CLONE_NEWNET = 0x40000000
_COMMAND_SECONDS = 10
_serial = itertools.count()


@dataclass(frozen=True)
class Host:
    """A namespace; this machine's root namespace, where tests run, reaches it at ``address``."""

    name: str
    address: str

    @contextmanager
    def entered(self) -> Iterator[None]:
        """The calling thread is in the namespace: sockets that it opens, and processes that it starts."""
        with open("/proc/thread-self/ns/net") as home, open(f"/run/netns/{self.name}") as there:
            _setns(there.fileno())
            try:
                yield
            finally:
                _setns(home.fileno())

    def popen(self, command: Sequence[str], **kwargs) -> subprocess.Popen:
        with self.entered():
            return subprocess.Popen(command, **kwargs)


def why_not() -> str | None:
    """What this machine lacks, or None."""
    if shutil.which("ip") is None:
        return "network namespaces need the command ip (package iproute2)"
    if os.geteuid() != 0:
        return "network namespaces need root"
    name = _name("p")
    tried = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, check=False)
    if tried.returncode:
        return f"network namespaces are not permitted here: {tried.stderr.strip()}"
    _ip("netns", "del", name)
    return None


@contextmanager
def hosts(count: int) -> Iterator[list[Host]]:
    """``count`` hosts that reach each other and this machine. 198.18.0.0/15 is for tests (RFC 2544)."""
    bridge, net = _name("b"), f"198.{18 + os.getpid() % 2}.{os.getpid() // 2 % 256}"
    made: list[Host] = []
    try:
        _ip("link", "add", bridge, "type", "bridge")
        _ip("addr", "add", f"{net}.1/24", "dev", bridge)
        _ip("link", "set", bridge, "up")
        for index in range(count):
            host = Host(_name("n"), f"{net}.{index + 2}")
            outer, inner = _name("o"), _name("i")
            _ip("netns", "add", host.name)
            made.append(host)
            _ip("link", "add", outer, "type", "veth", "peer", "name", inner, "netns", host.name)
            _ip("link", "set", outer, "master", bridge, "up")
            _ip("-n", host.name, "addr", "add", f"{host.address}/24", "dev", inner)
            _ip("-n", host.name, "link", "set", inner, "up")
            _ip("-n", host.name, "link", "set", "lo", "up")
            # To nowhere but here; yet what asks the kernel for "the" address of a host (Ray does) needs one.
            _ip("-n", host.name, "route", "add", "default", "via", f"{net}.1")
        yield made
    finally:
        for host in made:
            for pid in _ip("netns", "pids", host.name).split():
                with suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
            _ip("netns", "del", host.name)  # its veth pair goes with it
        with suppress(subprocess.CalledProcessError):  # it was never made
            _ip("link", "del", bridge)


@pytest.fixture
def two_hosts() -> Iterator[list[Host]]:
    if reason := why_not():
        pytest.skip(reason)
    with hosts(2) as both:
        yield both


def _name(kind: str) -> str:
    """At most 15 characters, what the kernel allows for an interface."""
    return f"gn{kind}{os.getpid() % 1_000_000}-{next(_serial)}"


def _ip(*arguments: str) -> str:
    done = subprocess.run(
        ["ip", *arguments], capture_output=True, text=True, check=True, timeout=_COMMAND_SECONDS
    )
    return done.stdout


def _setns(descriptor: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(descriptor, _CLONE_NEWNET) != 0:
        raise OSError(ctypes.get_errno(), f"setns: {os.strerror(ctypes.get_errno())}")
