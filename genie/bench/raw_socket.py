"""A bare TCP link to another process: what the sockets of this machine give with nothing on top.

The other process is ``python -m genie.bench.raw_socket PORT REQUEST ANSWER CORE,...``: blocking
sockets without delay, one buffer that is used again and again, no framing. It connects back, so
that it needs no time limit of its own: when the measuring process is gone, so is its connection.
"""

from __future__ import annotations

import os
import socket
import struct
import subprocess
import sys
from collections.abc import Sequence

from genie.errors import MeasurementError

HOST = "127.0.0.1"
START_SECONDS = 20.0
ANSWER_SECONDS = 30
_PID = struct.Struct("<Q")
_COUNTERS = struct.Struct("<QQ")


class RawPeer:
    """The measuring end. Every request is ``request`` bytes and answered by ``answer`` bytes."""

    def __init__(self, request: int, answer: int, cores: Sequence[int]) -> None:
        self.bytes_out = self.bytes_in = 0
        self._answer = memoryview(bytearray(answer))
        with socket.create_server((HOST, 0)) as listener:
            listener.settimeout(START_SECONDS)
            port = str(listener.getsockname()[1])
            self._process = subprocess.Popen(
                [
                    sys.executable, "-m", "genie.bench.raw_socket",
                    port, str(request), str(answer), ",".join(map(str, cores)),
                ],
                stdin=subprocess.DEVNULL,
            )  # fmt: skip
            try:
                self._sock = _accept(listener, self._process.pid)
            except BaseException:
                self._stop()
                raise
        self.pid = self._process.pid

    def exchange(self, data: bytes | memoryview) -> None:
        """One request and its answer. Raises OSError when the other process is gone, or silent for 30 s."""
        self._sock.sendall(data)
        self.bytes_out += len(data)
        if _read(self._sock, self._answer) < len(self._answer):
            raise ConnectionError(f"the raw socket's peer (pid {self.pid}) is gone: start the run again")
        self.bytes_in += len(self._answer)

    def finish(self) -> tuple[int, int]:
        """Ends the conversation; returns what the other process counted: bytes in, bytes out."""
        self._sock.shutdown(socket.SHUT_WR)
        counters = memoryview(bytearray(_COUNTERS.size))
        if _read(self._sock, counters) < _COUNTERS.size:
            raise ConnectionError(f"the raw socket's peer (pid {self.pid}) ended without its counters")
        bytes_in, bytes_out = _COUNTERS.unpack(counters)
        return bytes_in, bytes_out

    def close(self) -> None:
        """May be called twice, and after a failure."""
        self._sock.close()
        self._stop()

    def _stop(self) -> None:
        self._process.kill()
        self._process.wait()


def _accept(listener: socket.socket, pid: int) -> socket.socket:
    try:
        sock, _ = listener.accept()
    except TimeoutError:
        raise MeasurementError(
            f"the raw socket's peer did not connect within {START_SECONDS:.0f} s: is the machine overloaded?"
        ) from None
    _tune(sock)
    hello = memoryview(bytearray(_PID.size))
    if _read(sock, hello) < _PID.size or _PID.unpack(hello) != (pid,):
        sock.close()
        raise MeasurementError("another process connected to the raw socket's port: start the run again")
    return sock


def _tune(sock: socket.socket) -> None:
    """Blocking; the limit is the kernel's, because Python's own would poll before each call."""
    sock.settimeout(None)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    limit = struct.pack("@ll", ANSWER_SECONDS, 0)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)


def _read(sock: socket.socket, target: memoryview) -> int:
    """Bytes read: fewer than ``target`` holds only at the end of the stream."""
    at = 0
    while at < len(target):
        n = sock.recv_into(target[at:] if at else target, 0, socket.MSG_WAITALL)
        if not n:
            break
        at += n
    return at


def _serve(port: int, request: int, answer: int) -> None:
    with socket.create_connection((HOST, port), START_SECONDS) as sock:
        _tune(sock)
        # The measuring process may pause for as long as it likes; it cannot vanish unnoticed.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("@ll", 0, 0))
        sock.sendall(_PID.pack(os.getpid()))
        buffer, reply = memoryview(bytearray(request)), bytes(answer)
        bytes_in = bytes_out = 0
        while True:
            n = _read(sock, buffer)
            bytes_in += n
            if n < request:
                break
            sock.sendall(reply)
            bytes_out += answer
        sock.sendall(_COUNTERS.pack(bytes_in, bytes_out))


if __name__ == "__main__":
    os.sched_setaffinity(0, [int(core) for core in sys.argv[4].split(",")])
    _serve(*map(int, sys.argv[1:4]))
