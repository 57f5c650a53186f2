"""The client's end of one session with one server. Not thread-safe: its caller holds one lock."""

from __future__ import annotations

import contextlib
import socket
import ssl
from collections import deque
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

from torch import Tensor

from genie import errors
from genie.errors import AuthError, ConnectError, GenieError, ProtocolError, RemoteError, ServerLostError
from genie.wire import auth
from genie.wire.backlog import LIMIT
from genie.wire.framing import HANDSHAKE_HEADER, MAX_HEADER, Channel, tune
from genie.wire.messages import (
    PROTOCOL_VERSION,
    Auth,
    Bye,
    Challenge,
    Error,
    Result,
    ServerMessage,
    Welcome,
)
from genie.wire.tensors import unpack

LogTail = Callable[[], str]

_LAST_WORDS_SECONDS = 0.5


class Connection:
    """Requests go out in order and are answered in order; several may be on their way.

    Sending does not wait for the server, nor is a buffer needed after the call: what the socket does not
    take is copied, up to ``backlog_bytes``, and follows by itself (not under TLS). Beyond that the caller
    waits. An error of such bytes is raised by the next call.

    Once an I/O call has failed the session is gone, and each later call raises that same error.
    """

    def __init__(
        self, channel: Channel, address: str, log_tail: LogTail | None, backlog_bytes: int = LIMIT
    ) -> None:
        self._channel: Channel[Any] = channel
        self.address = address
        self._log_tail = log_tail
        self._backlog_bytes = backlog_bytes
        self._lost: GenieError | None = None
        self._outstanding = 0
        self._ready: deque[tuple[Any, Tensor]] = deque()
        self.round_trips = 0
        self.last_error: Error | None = None
        self.welcome: Welcome

    @classmethod
    def connect(
        cls,
        address: str,
        token: str,
        *,
        timeout: float = 10.0,
        tls_ca: str | None = None,
        log_tail: LogTail | None = None,
        backlog_bytes: int = LIMIT,
    ) -> Connection:
        """Opens and authenticates a session. ``address`` is "host:port" or "[ipv6]:port"; ``timeout``
        is in seconds, for connecting and for each message of the handshake.

        Raises ConnectError, AuthError, ProtocolError, or ServerLostError.
        """
        host, port = parse_address(address)
        try:
            sock = socket.create_connection((host, port), timeout)
        except OSError as exc:
            raise ConnectError(
                f"no Genie server can be reached at {address} ({exc.strerror or exc}): check the address, "
                "and that `genie serve` runs there",
                log_tail() if log_tail else "",
            ) from exc
        try:
            tune(sock)
            if tls_ca is not None:
                sock = auth.client_tls(tls_ca).wrap_socket(sock, server_hostname=host)
            channel: Channel[Any] = Channel(sock, ServerMessage, HANDSHAKE_HEADER)
            connection = cls(channel, address, log_tail, backlog_bytes)
            connection._handshake(token, timeout)
            return connection
        except ssl.SSLError as exc:
            sock.close()
            raise ConnectError(
                f"no TLS session with {address}: {exc}; check tls_ca, and that the server has --tls-cert"
            ) from exc
        except BaseException:
            sock.close()
            raise

    def _handshake(self, token: str, timeout: float) -> None:
        challenge, _ = self._receive()
        if not isinstance(challenge, Challenge):
            raise ProtocolError(
                f"{self.address} greeted with {type(challenge).__name__}: is it a Genie server?"
            )
        nonce = auth.new_nonce()
        self._send(Auth(PROTOCOL_VERSION, auth.client_mac(token, challenge.nonce), nonce), ())
        self._channel.max_header = MAX_HEADER  # a refusal carries the log's tail
        welcome, _ = self._receive()
        if isinstance(welcome, Error):
            self.last_error = welcome
            raise exception_of(welcome)
        if not isinstance(welcome, Welcome) or not auth.same_mac(welcome.mac, auth.server_mac(token, nonce)):
            raise AuthError(f"the server at {self.address} does not know the token: do not trust it")
        self.welcome = welcome
        self._channel.settimeout(None)
        self._channel.send_later(self._backlog_bytes)

    # -- requests --------------------------------------------------------------------------------

    def post(self, message: Any, buffers: Sequence[Any] = ()) -> None:
        """Sends a message that has no reply of its own (Upload, Adopt, Release)."""
        self._send(message, buffers)

    def send(self, message: Any, buffers: Sequence[Any] = ()) -> None:
        """Sends a request; its reply comes from a later `receive`, in order."""
        self._send(message, buffers)
        self._outstanding += 1

    def receive(self) -> tuple[Any, Tensor]:
        """The reply to the oldest request that has none yet, and its payload (uint8).

        Raises the typed error that the server answered with (`last_error` holds it as it came), or
        ServerLostError.
        """
        if self._ready:
            reply, payload = self._ready.popleft()
        elif not self._outstanding:
            raise RuntimeError("receive() without a request that waits for its reply")
        else:
            reply, payload = self._receive()
            self._outstanding -= 1
        self.round_trips += 1
        if type(reply) is Error:
            self.last_error = reply
            raise exception_of(reply)
        return reply, payload

    def request(self, message: Any, buffers: Sequence[Any] = ()) -> tuple[Any, Tensor]:
        """`send`, then `receive`; nothing else may be on its way."""
        if self._lost is not None:
            raise self._lost
        if self._outstanding or self._ready:
            raise RuntimeError(
                "request() while earlier requests wait for their replies: receive() those first"
            )
        self.send(message, buffers)
        return self.receive()

    def _send(self, message: Any, buffers: Sequence[Any]) -> None:
        if self._lost is not None:
            raise self._lost
        try:
            if self._outstanding:
                # The server may be blocked on a large reply, and would not read us before we read it.
                self._channel.send(message, buffers, self._stash)
            else:
                self._channel.send(message, buffers)
        except OSError as exc:
            raise self._last_words() or self._lose(exc) from exc

    def _stash(self) -> None:
        if not self._outstanding:
            raise ProtocolError(f"{self.address} sent a message that nobody asked for")
        self._ready.append(self._channel.receive())
        self._outstanding -= 1

    def _receive(self) -> tuple[Any, Tensor]:
        if self._lost is not None:
            raise self._lost
        try:
            return self._channel.receive()
        except OSError as exc:
            raise self._lose(exc) from exc
        except ProtocolError as exc:
            self._lost = exc
            self._channel.close()
            raise

    def _last_words(self) -> GenieError | None:
        """The error with which a server closed the session while we were still sending, if it came."""
        try:
            self._channel.settimeout(_LAST_WORDS_SECONDS)
            for _ in range(self._outstanding + 1):
                reply, _payload = self._channel.receive()
        except (OSError, ProtocolError):
            return None
        if type(reply) is not Error:
            return None
        self.last_error = reply
        self._lost = exception_of(reply)
        self._channel.close()
        return self._lost

    def _lose(self, exc: OSError) -> GenieError:
        """Closes the dead connection and says why, with the tail of the server's log."""
        tail = self._log_tail() if self._log_tail else ""
        reason = "it did not answer in time" if isinstance(exc, TimeoutError) else str(exc)
        self._lost = ServerLostError(
            f"the connection to the server at {self.address} ended ({reason}): the server was stopped or it "
            "crashed; start it again and open a new session",
            tail,
        )
        self._channel.close()
        return self._lost

    # -- state -----------------------------------------------------------------------------------

    @property
    def bytes_in(self) -> int:
        """Bytes of all frames received, handshake included."""
        return self._channel.bytes_in

    @property
    def bytes_out(self) -> int:
        """Bytes of all frames sent, as the socket took them. Waits for those that it has not taken yet;
        after a failure, those that it took."""
        if self._lost is None:
            try:
                self._channel.settle(self._stash if self._outstanding else None)
            except OSError as exc:
                if self._last_words() is None:
                    self._lose(exc)  # the next call raises it
        return self._channel.bytes_out

    @property
    def bytes_accepted(self) -> int:
        """``bytes_out``, and what follows by itself. Does not wait."""
        return self._channel.bytes_accepted

    @property
    def alive(self) -> bool:
        return self._lost is None

    @property
    def lost(self) -> GenieError | None:
        """Why the session is gone, if it is."""
        return self._lost

    def close(self) -> None:
        """Ends the session; the server frees what it held. May be called twice, and after a failure."""
        if self._lost is None:
            if not self._outstanding:
                with contextlib.suppress(OSError):  # a server that is gone has no session left to end
                    if self._channel.settle(timeout_s=_LAST_WORDS_SECONDS):
                        self._channel.settimeout(_LAST_WORDS_SECONDS)
                        self._channel.send(Bye())
            self._lost = errors.SessionClosedError(
                f"the session with {self.address} was closed: open a new one"
            )
        self._channel.close()

    def __enter__(self) -> Connection:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def parse_address(address: str) -> tuple[str, int]:
    """ "host:port" or "[ipv6]:port". Raises ConnectError."""
    host, colon, port = address.rpartition(":")
    if not colon or not port.isdecimal() or not 0 < int(port) < 65536 or not host.strip("[]"):
        raise ConnectError(f"{address!r} is no server address: write host:port")
    return host.strip("[]"), int(port)


def exception_of(error: Error) -> GenieError:
    """The exception of genie.errors that an Error message names."""
    kind = getattr(errors, error.error, None)
    if not (isinstance(kind, type) and issubclass(kind, GenieError)):
        return RemoteError(f"{error.error}: {error.message}", error.log_tail)
    if issubclass(kind, RemoteError):
        return kind(error.message, error.log_tail)
    return kind(error.message)


def fetched_tensors(result: Result, payload: Tensor) -> list[Tensor]:
    """The tensors of ``Execute.fetch``, on the CPU. For a stateless program use `live_tensors`."""
    return unpack_result(result, payload)[: len(result.fetched)]


def live_tensors(result: Result, payload: Tensor) -> dict[int, Tensor]:
    """Handle to value of a stateless program's live results, aliases sharing storage; those that
    are resident on the server are left out."""
    tensors = unpack_result(result, payload)[len(result.fetched) :]
    handles = [v.handle for v in result.live if v.spec.storage >= 0]
    return dict(zip(handles, tensors, strict=True))


def unpack_result(result: Result, payload: Tensor) -> list[Tensor]:
    """All tensors of a reply's payload: the fetched ones, then the live ones that travelled."""
    specs = [*result.fetched, *(v.spec for v in result.live if v.spec.storage >= 0)]
    return unpack(payload, specs, result.storages)
