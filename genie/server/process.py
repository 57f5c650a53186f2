"""The server process: binds, prints its ready line, accepts, and stops cleanly."""

from __future__ import annotations

import ctypes
import errno
import json
import logging
import os
import signal
import socket
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from genie.device_facts import cpu_model, device_facts
from genie.devices import DeviceSlot, pin, resolve_device_type
from genie.errors import ConfigError, ConnectError
from genie.server.checkpoints import Checkpoints
from genie.server.device import Device
from genie.server.faults import TailHandler
from genie.server.session import ServerState, Session
from genie.server.weights import WeightStore
from genie.wire import auth
from genie.wire.framing import Channel, tune
from genie.wire.messages import ClientMessage

if TYPE_CHECKING:
    from genie.launch.member import Member

log = logging.getLogger("genie.server")

STOP_SECONDS = 2.0
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class ServeOptions:
    """``port`` 0 lets the kernel choose; ``memory_limit`` is per session, 0 = none; bytes throughout."""

    host: str = "127.0.0.1"
    peer_host: str = ""
    port: int = 0
    device: str = "auto"
    cores: tuple[int, ...] = ()
    log_file: str | None = None
    memory_limit: int = 0
    keep_weights: int = 0
    checkpoints: tuple[str, ...] = ()
    token_file: str | None = None
    tls_cert: str | None = None
    tls_key: str | None = None
    insecure: bool = False
    die_with_parent: bool = False
    ready_fd: int = 1


class Server:
    """One process, one device. Each connection is served by a thread of its own."""

    def __init__(self, options: ServeOptions, slot: DeviceSlot, token: str, tail: TailHandler) -> None:
        tls = options.tls_cert is not None and options.tls_key is not None
        self._tls = auth.server_tls(options.tls_cert or "", options.tls_key or "") if tls else None
        self._device = Device(slot.torch_device, device_name(slot), device_facts(slot))
        self._state = ServerState(
            self._device,
            token,
            options.memory_limit,
            WeightStore(options.keep_weights),
            tail.tail,
            Checkpoints(options.checkpoints),
        )
        self._listener = listen(options.host, options.port)
        self._sessions: dict[Session, threading.Thread] = {}
        self._lock = threading.Lock()
        self._stopping = False
        host, port = self._listener.getsockname()[:2]
        self._peer_host = options.peer_host or ("" if host in ("0.0.0.0", "::") else host)
        self.address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        self.device_name = self._device.name

    def serve(self) -> None:
        """Accepts until `stop`."""
        while not self._stopping:
            try:
                sock, peer = self._listener.accept()
            except OSError as exc:
                if self._stopping:
                    break
                if exc.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.ECONNABORTED):
                    log.warning("cannot accept a connection: %s", exc)
                    time.sleep(0.05)
                    continue
                raise
            name = f"{peer[0]}:{peer[1]}"
            threading.Thread(target=self._session, args=(sock, name), name=name, daemon=True).start()

    def _session(self, sock: socket.socket, peer: str) -> None:
        try:
            tune(sock)
            if self._tls is not None:
                sock.settimeout(10.0)
                sock = self._tls.wrap_socket(sock, server_side=True)
        except OSError as exc:
            log.warning("%s: no session: %s", peer, exc)
            sock.close()
            return
        # Where it listens everywhere, the client's way here is the best guess at the other servers'.
        peer_host = self._peer_host or sock.getsockname()[0]
        session = Session(Channel(sock, ClientMessage), self._state, peer, peer_host)
        with self._lock:
            self._sessions[session] = threading.current_thread()
        try:
            session.serve()
        finally:
            with self._lock:
                del self._sessions[session]

    def stop(self) -> None:
        """Wakes `serve` and every session. Safe to call from a signal handler, and twice."""
        self._stopping = True
        try:
            self._listener.shutdown(socket.SHUT_RDWR)
        except OSError as exc:
            log.debug("the listener was shut down already: %s", exc)

    def close(self) -> None:
        """Ends all sessions, and waits a little for those that are in the middle of a request."""
        self._listener.close()
        with self._lock:
            sessions = dict(self._sessions)
        for session in sessions:
            session.abort()
        deadline = time.monotonic() + STOP_SECONDS
        for thread in sessions.values():
            thread.join(max(0.0, deadline - time.monotonic()))


def listen(host: str, port: int) -> socket.socket:
    """Raises ConnectError when the port is taken or the address is not this machine's."""
    try:
        family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        sock = socket.socket(family, kind, proto)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(address)
            sock.listen(64)
        except OSError:
            sock.close()
            raise
    except OSError as exc:
        if exc.errno == errno.EADDRINUSE:
            remedy = "another process listens there: choose another --port, or 0 to let the kernel choose"
        else:
            remedy = "give a --host that is an address of this machine, and a port that you may use"
        raise ConnectError(f"cannot listen on {host}:{port} ({exc.strerror}); {remedy}") from exc
    return sock


def device_name(slot: DeviceSlot) -> str:
    """Type, index and model: "cuda:0 NVIDIA H200", "cpu:1 AMD EPYC 9654"."""
    if slot.type == "cuda":
        return f"cuda:{slot.index} {torch.cuda.get_device_name(slot.index)}"
    return f"cpu:{slot.index} {cpu_model()}"


def parse_device(text: str, cores: tuple[int, ...]) -> DeviceSlot:
    """ "cpu", "cpu:1", "cuda", "cuda:3" or "auto". Raises ConfigError for a device that is not there."""
    kind, _, index = text.partition(":")
    if index and not index.isdecimal():
        raise ConfigError(f"--device {text}: the index must be a number, as in cuda:0")
    device_type = resolve_device_type(kind)
    number = int(index or 0)
    if device_type == "cuda" and number >= torch.cuda.device_count():
        raise ConfigError(f"--device {text}: this host has {torch.cuda.device_count()} GPUs, counted from 0")
    return DeviceSlot(device_type, number, cores or tuple(sorted(os.sched_getaffinity(0))))


def serve(options: ServeOptions, started: float, member: Member | None = None) -> int:
    """Runs a server until SIGTERM, SIGINT, or (if asked) the parent's end. Returns the exit status.

    ``started``: `time.monotonic` before torch was imported. ``member``: the pool that it joins before
    the ready line. Raises ConfigError, AuthError or ConnectError before that line; afterwards problems
    go to the log.
    """
    imported = time.monotonic()
    if options.die_with_parent or (member is not None and member.dies_with_starter):
        _die_with_parent()
    if (options.tls_cert is None) != (options.tls_key is None):
        raise ConfigError("--tls-cert and --tls-key go together: give both")
    token = auth.load_token(options.token_file)
    auth.check_bind(
        options.host,
        token_given=token is not None,
        tls=options.tls_cert is not None,
        insecure=options.insecure,
    )
    if token is None:
        raise ConfigError(
            f"a server needs a token, also on loopback: put one into {auth.TOKEN_VARIABLE} or a "
            "--token-file, and give clients the same"
        )
    slot = parse_device(options.device, options.cores)
    tail = set_up_log(options.log_file)
    try:
        pin(slot)
    except OSError as exc:
        raise ConfigError(
            f"cannot run on the cores {slot.cores}: {exc.strerror}; give others to --cores"
        ) from exc
    if slot.type == "cuda":
        torch.cuda.set_device(slot.index)
        torch.empty(1, device=slot.torch_device)  # creates the context before a client waits for it
    server = Server(options, slot, token, tail)
    if member is not None:
        # A signal ends the process meanwhile: it waits for others inside a library, and has no client yet.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        member.announce(server.address, server.device_name)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: server.stop())
    if options.die_with_parent:
        threading.Thread(target=_stop_at_eof, args=(server,), name="parent", daemon=True).start()
    threading.excepthook = lambda args: log.error(
        "thread %s died", args.thread and args.thread.name, exc_info=args.exc_value
    )
    log.info(
        "ready on %s as %s, cores %s; torch import %.2f s, after it %.2f s",
        server.address, server.device_name, slot.cores, imported - started, time.monotonic() - imported,
    )  # fmt: skip
    _print_ready(options.ready_fd, server)
    try:
        server.serve()
    finally:
        if member is not None:
            member.leave()
        server.close()
    log.info("stopped")
    return 0


def set_up_log(log_file: str | None) -> TailHandler:
    """Logs to the file (or stderr), and keeps the last lines for errors."""
    tail = TailHandler()
    sink: logging.Handler
    try:
        if log_file is None:
            sink = logging.StreamHandler(sys.stderr)
        else:
            Path(log_file).parent.mkdir(parents=True, exist_ok=True)
            sink = logging.FileHandler(log_file)
    except OSError as exc:
        raise ConfigError(f"cannot write the log file {log_file}: {exc.strerror}") from exc
    formatter = logging.Formatter("%(asctime)s %(levelname)s %(message)s")
    logger = logging.getLogger("genie")
    logger.setLevel(logging.INFO)
    for handler in (sink, tail):
        handler.setFormatter(formatter)
        logger.addHandler(handler)
    return tail


def _print_ready(fd: int, server: Server) -> None:
    line = {"address": server.address, "pid": os.getpid(), "device": server.device_name}
    os.write(fd, (json.dumps(line) + "\n").encode())
    if fd > 2:
        os.close(fd)


def _die_with_parent() -> None:
    """The kernel signals us when the thread that started us dies; must run in the main thread.

    End of file on stdin says the same, and also covers a parent that died before this call.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0) != 0:
        raise ConfigError(f"--die-with-parent: prctl failed: {os.strerror(ctypes.get_errno())}")


def _stop_at_eof(server: Server) -> None:
    while os.read(0, 4096):
        continue
    log.info("the parent closed our stdin")
    server.stop()
