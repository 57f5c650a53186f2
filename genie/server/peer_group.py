"""A group of servers as torch.distributed sees it: the store where they meet, and point-to-point transfers.

The one place that uses private constructors of torch.distributed: several sessions of one process have
groups of their own, which `init_process_group` does not offer. Gloo moves CPU tensors, NCCL those of a GPU.
Nothing here is encrypted or authenticated: the interface is to be one of a trusted network.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import time
import zlib
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from genie.errors import PeerError
from genie.wire.messages import PeerJoin

log = logging.getLogger("genie.server")

_GREETING = 0  # the slot of the first transfer in each direction
_NEVER_SENT = (1 << 31) - 1  # a slot above all that `PeerGroup.slot` returns
_POLL_FROM, _POLL_TO = 20e-6, 1e-3  # seconds between two looks at a transfer of NCCL

# The default of NCCL's watchdog is to end the process when a transfer hangs; other sessions live in it. Its
# transfers are timed here instead (`PeerGroup.wait`).
_NCCL_ENVIRONMENT = {
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0",
    "TORCH_NCCL_ENABLE_MONITORING": "0",
    "TORCH_NCCL_DUMP_ON_TIMEOUT": "0",
    "TORCH_NCCL_PROPAGATE_ERROR": "0",
}


def open_store(host: str) -> tuple[Any, int]:
    """A store that listens on ``host`` only, and its port. Raises PeerError."""
    try:
        family, kind, proto, _, address = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, proto)
        try:
            listener.bind(address)
            listener.listen(64)
        except OSError:
            listener.close()
            raise
    except OSError as exc:
        raise PeerError(
            f"no group can meet at {host} ({exc.strerror or exc}): start the server with a --peer-host that "
            "is an address of its machine, in the pool's network"
        ) from exc
    port = listener.getsockname()[1]
    # The store owns the descriptor from here on.
    store = dist.TCPStore(
        host, port, None, True, timedelta(seconds=60), False, master_listen_fd=listener.detach()
    )
    return store, port


class PeerGroup:
    """One session's membership in a group. Not thread-safe, but for `wait` and `leave`.

    Each pair of members counts its transfers in either direction. Both ends derive what gloo matches by from
    that count, the tag and the size: two ends that disagree then wait in vain and time out, whereas a
    transfer larger than its receiver's buffer would end the receiving process.
    """

    def __init__(self, message: PeerJoin, host: str, device: torch.device) -> None:
        """Returns once all members have joined. ``host``: the address to bind to. Raises PeerError."""
        self.rank, self.world, self.timeout_s = message.rank, message.world, message.timeout_s
        self.backend = "nccl" if device.type == "cuda" else "gloo"
        self._device = device
        self._numbers: dict[tuple[bool, int], int] = {}
        self._left = False
        self._groups: list[Any] = []
        sound = 0 <= self.rank < self.world <= 4096 and 0 < message.port < 65536
        if not sound or not 0 < self.timeout_s <= 1e6:
            raise PeerError(
                f"number {self.rank} of {self.world} at port {message.port}, {self.timeout_s} s, is no place "
                "in a group: count from 0, give the port of a PeerAddress, and a timeout"
            )
        try:
            store = self._meet(message)
            if self.backend == "gloo":
                group = _gloo(dist.PrefixStore("gloo", store), self.rank, self.world, self._timeout, host)
                self._rising = self._falling = group
                self._groups = [group]
            else:
                # Transfers of a pair queue in one stream: with both directions in it, two members that
                # each receive before they send would wait for each other for ever.
                _prepare_nccl(host)
                for name in ("rising", "falling"):
                    self._groups.append(
                        _nccl(dist.PrefixStore(name, store), self.rank, self.world, self._timeout)
                    )
                self._rising, self._falling = self._groups
            self._store = store  # NCCL's threads look into it
            self._greet()
        except RuntimeError as exc:  # PeerError is none
            self.leave()
            raise PeerError(
                f"server {self.rank} of {self.world} could not join the group at {message.host}:"
                f"{message.port} within {self.timeout_s:g} s ({_first_line(exc)}): check that all members "
                "run and join, and that they reach each other (--peer-host)"
            ) from exc
        except BaseException:
            self.leave()
            raise

    @property
    def _timeout(self) -> timedelta:
        return timedelta(seconds=self.timeout_s)

    def _meet(self, message: PeerJoin) -> Any:
        store = dist.TCPStore(message.host, message.port, None, False, self._timeout, False)
        world = store.compare_set("world", "", str(self.world)).decode()
        if world != str(self.world) or store.add(f"rank {self.rank}", 1) != 1:
            raise PeerError(
                f"server {self.rank} of {self.world} cannot join at {message.host}:{message.port}: a group "
                f"of {world} was formed there, or has this member already; each needs a PeerListen of its own"
            )
        return store

    def _greet(self) -> None:
        """Every pair moves one byte in both directions, in the same order everywhere: so that a pair that
        cannot talk is found now, and NCCL, which connects at first use, never does so in the middle."""
        byte = torch.zeros(1, dtype=torch.uint8, device=self._device)
        for low in range(self.world):
            for high in range(low + 1, self.world):
                if self.rank in (low, high):
                    other = low + high - self.rank
                    for sends in (self.rank == low, self.rank == high):
                        move = self._post_send if sends else self._post_receive
                        self.wait(move(byte, other, _GREETING), other)

    # -- transfers -------------------------------------------------------------------------------

    def check(self, other: int) -> None:
        """Raises PeerError unless ``other`` is another member."""
        if not 0 <= other < self.world or other == self.rank:
            raise PeerError(
                f"server {other} is not another member of this group of {self.world}: name one by its rank"
            )

    def slot(self, other: int, tag: int, nbytes: int, *, sends: bool) -> int:
        """What the next transfer with a member is matched by. To be taken also when the rest then fails,
        or the two ends would count differently from there on."""
        key = (sends, other)
        number = self._numbers[key] = self._numbers.get(key, 0) + 1
        mark = zlib.crc32(b"%d %d" % (tag, nbytes)) & 0x7FFF
        return (number & 0x7FFF) << 15 | mark

    def send(self, buffer: torch.Tensor, target: int, slot: int) -> Any:
        """Starts to send ``buffer`` (uint8), which must stay as it is until `wait` returns. PeerError."""
        return self._posting(self._post_send, buffer, target, slot)

    def receive(self, buffer: torch.Tensor, source: int, slot: int) -> Any:
        """Starts to receive into ``buffer`` (uint8), which must live until `wait` returns. PeerError."""
        return self._posting(self._post_receive, buffer, source, slot)

    def _posting(self, post: Any, buffer: torch.Tensor, other: int, slot: int) -> Any:
        if self._left:
            raise self._error(other, "this session has left the group")
        try:
            return post(buffer, other, slot)
        except RuntimeError as exc:
            raise self._error(other, _first_line(exc)) from exc

    def _post_send(self, buffer: torch.Tensor, target: int, slot: int) -> Any:
        return (self._rising if self.rank < target else self._falling).send([buffer], target, slot)

    def _post_receive(self, buffer: torch.Tensor, source: int, slot: int) -> Any:
        return (self._rising if source < self.rank else self._falling).recv([buffer], source, slot)

    def wait(self, work: Any, other: int) -> None:
        """Until the transfer with member ``other`` is complete. Raises PeerError when that member is gone, or
        after the timeout; all other transfers of this group have then ended as well."""
        try:
            if self.backend == "gloo":
                work.wait(self._timeout)
                return
            deadline, pause = time.monotonic() + self.timeout_s, 0.0
            while not work.is_completed():
                if self._left:
                    raise self._error(other, "this session has left the group")
                if time.monotonic() > deadline:
                    self.leave()
                    raise self._error(other, f"timed out after {self.timeout_s:g} s")
                time.sleep(pause)
                pause = min(max(2 * pause, _POLL_FROM), _POLL_TO)
            if self._left:  # a transfer that was cut off looks complete
                raise self._error(other, "this session has left the group")
            work.wait()  # raises what went wrong; the stream waits for what is complete
        except RuntimeError as exc:
            raise self._error(other, _first_line(exc)) from exc

    def _error(self, other: int, reason: str) -> PeerError:
        return PeerError(
            f"server {other} of the peer group did not take part in a transfer with server {self.rank} "
            f"({reason}): it was stopped, it cannot be reached, or it has more to do than the timeout of "
            f"{self.timeout_s:g} s allows; see its log, then form a new group of the servers that are left"
        )

    def leave(self) -> None:
        """Ends all transfers under way, here and at the other members, with an error. May be called twice."""
        if self._left:
            return
        self._left = True
        groups, self._groups = self._groups, []
        for group in groups:
            if self.backend == "nccl":
                with contextlib.suppress(RuntimeError):  # communicators that failed before
                    group.abort()
            else:
                _end_gloo(group, self.rank, self.world)
        # The last references: closes the sockets and ends the threads.
        self._rising = self._falling = self._store = None


def _gloo(store: Any, rank: int, world: int, timeout: timedelta, host: str) -> Any:
    kind: Any = dist.ProcessGroupGloo
    options = kind._Options()
    options._devices = [kind.create_device(hostname=host)]
    options._timeout = timeout
    options._threads = 1  # for collectives, which nobody calls
    return kind(store, rank, world, options)


def _end_gloo(group: Any, rank: int, world: int) -> None:
    """Gloo has no call that wakes its waiters. But a transfer that times out ends all of its group."""
    byte = torch.zeros(1, dtype=torch.uint8)
    for other in range(world):
        if other != rank:
            # With a member that is gone it fails before it can time out, and wakes nobody: so try them all.
            with contextlib.suppress(RuntimeError):
                group.recv([byte], other, _NEVER_SENT).wait(timedelta(milliseconds=1))


def _nccl(store: Any, rank: int, world: int, timeout: timedelta) -> Any:
    kind: Any = dist.ProcessGroupNCCL
    options = kind.Options()
    options._timeout = timeout
    return kind(store, rank, world, options)


def _prepare_nccl(host: str) -> None:
    """What NCCL takes from the environment, which it reads once in a process."""
    os.environ.update(_NCCL_ENVIRONMENT)
    if "NCCL_SOCKET_IFNAME" not in os.environ:
        import psutil

        address = socket.gethostbyname(host) if ":" not in host else host
        for name, addresses in psutil.net_if_addrs().items():
            if any(a.address == address for a in addresses):
                os.environ["NCCL_SOCKET_IFNAME"] = f"={name}"


def _first_line(exc: BaseException) -> str:
    return str(exc).splitlines()[0] if str(exc) else type(exc).__name__
