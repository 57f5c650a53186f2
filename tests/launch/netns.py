"""Hosts for tests: network namespaces of this machine, each with an address of its own, on one bridge.

Processes in them share the disk, the cores and the clock, but reach each other by their addresses only:
what listens on the loopback of one is not there for another.
"""

from __future__ import annotations

import ctypes
import itertools
import json
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
            # Ray asks the kernel which address a host would reach the internet from. It ends here, and no
            # default route with it: a look-up of names would wait for an answer, and now fails at once.
            _ip("-n", host.name, "route", "add", "8.8.8.8/32", "via", f"{net}.1")
        yield made
    finally:
        for host in made:
            for pid in _ip("netns", "pids", host.name).split():
                with suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
            _ip("netns", "del", host.name)  # its veth pair goes with it
        with suppress(subprocess.CalledProcessError):  # it was never made
            _ip("link", "del", bridge)


class Cable:
    """Between two hosts, beside the network that all share: for what only these two tell each other."""

    def __init__(self, hosts: Sequence[Host]) -> None:
        self._hosts = tuple(hosts)
        self._ends = (_name("x"), _name("y"))
        there = self._hosts[1].name
        _ip("-n", self._hosts[0].name, "link", "add", self._ends[0], "type", "veth",
            "peer", "name", self._ends[1], "netns", there)  # fmt: skip
        #: of its two ends; 192.0.2.0/24 is for documentation (RFC 5737), so it is on no other network
        self.addresses = ("192.0.2.1", "192.0.2.2")
        for host, end, address in zip(self._hosts, self._ends, self.addresses, strict=True):
            _ip("-n", host.name, "addr", "add", f"{address}/24", "dev", end)
            _ip("-n", host.name, "link", "set", end, "up")

    def carried(self) -> tuple[int, int]:
        """Bytes that went in from the first host, and from the second, as the kernel counts them."""
        sent = []
        for host, end in zip(self._hosts, self._ends, strict=True):
            (link,) = json.loads(_ip("-n", host.name, "-s", "-j", "link", "show", end))
            sent.append(link["stats64"]["tx"]["bytes"])
        return sent[0], sent[1]

    @contextmanager
    def limited(self, bytes_per_s: float) -> Iterator[None]:
        """In both directions."""
        shape = ("tbf", "rate", f"{bytes_per_s * 8:.0f}bit", "burst", "256k", "latency", "100ms")
        for host, end in zip(self._hosts, self._ends, strict=True):
            _run("tc", "-n", host.name, "qdisc", "add", "dev", end, "root", *shape)
        try:
            yield
        finally:
            for host, end in zip(self._hosts, self._ends, strict=True):
                _run("tc", "-n", host.name, "qdisc", "del", "dev", end, "root")

    @contextmanager
    def cut(self) -> Iterator[None]:
        """What is sent into it is lost, and nobody is told."""
        ends = list(zip(self._hosts, self._ends, strict=True))
        for host, end in ends:
            _ip("-n", host.name, "link", "set", end, "down")
        try:
            yield
        finally:
            for host, end in ends:
                _ip("-n", host.name, "link", "set", end, "up")


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
    return _run("ip", *arguments)


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=_COMMAND_SECONDS)
    return done.stdout


def _setns(descriptor: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(descriptor, _CLONE_NEWNET) != 0:
        raise OSError(ctypes.get_errno(), f"setns: {os.strerror(ctypes.get_errno())}")
