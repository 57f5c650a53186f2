"""One client's session: the request loop of one connection, in one thread."""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from genie.errors import AuthError, DeviceLostError, GenieError, ProtocolError
from genie.gpu_meter import GpuMeter
from genie.server.checkpoints import Checkpoints
from genie.server.device import Device
from genie.server.execute import MAX_TEMPLATES, Executor
from genie.server.faults import Fault, fault_of
from genie.server.load import load_of
from genie.server.offers import Offers
from genie.server.peers import Peers
from genie.server.store import HandleStore
from genie.server.trace import SessionTrace
from genie.server.uploads import Landing, Uploads
from genie.server.weights import WeightStore
from genie.wire import auth
from genie.wire.framing import EMPTY, HANDSHAKE_HEADER, MAX_HEADER, Channel, PeerClosedError
from genie.wire.messages import (
    PROTOCOL_VERSION,
    Adopt,
    Auth,
    Bye,
    Challenge,
    ClientMessage,
    Configure,
    Counters,
    CountersReply,
    Execute,
    Expect,
    GpuReading,
    Load,
    Offer,
    PeerJoin,
    PeerListen,
    Ping,
    Pong,
    ReadGpu,
    Release,
    Result,
    Send,
    TensorSpec,
    Trace,
    TraceReply,
    Upload,
    Welcome,
)
from genie.wire.tensors import DTYPES, dense_nbytes, over_storage

log = logging.getLogger("genie.server")

HANDSHAKE_SECONDS = 10.0
LINGER_SECONDS = 2.0
ONE_WAY = frozenset((Configure, Upload, Adopt, Release, Expect, Send))
#: neither use nor change what the session holds
HARMLESS = frozenset((Ping, Load))


@dataclass
class ServerState:
    """What all sessions of a server share."""

    device: Device
    token: str
    memory_limit: int
    weights: WeightStore
    log_tail: Callable[[], str]
    checkpoints: Checkpoints = field(default_factory=Checkpoints)
    max_templates: int = MAX_TEMPLATES  # that a session may have defined at a time
    numbers: itertools.count = field(default_factory=lambda: itertools.count(1))
    sessions: dict[int, Session] = field(default_factory=dict)  # that are open, by number


class Session:
    """Serves one connection until it ends. Whatever ends it, everything it held is freed."""

    def __init__(self, channel: Channel, state: ServerState, peer: str, peer_host: str = "127.0.0.1") -> None:
        """``peer``: the client's address. ``peer_host``: this server's, for other servers."""
        self._channel: Channel[Any] = channel
        self._state = state
        self.name = f"session {next(state.numbers)} from {peer}"
        self.number = int(self.name.split()[1])
        self._store = HandleStore(state.memory_limit)
        self._executor = Executor(state.device, self._store, state.max_templates)
        self._peers = Peers(state.device, self._store, state.weights, peer_host)
        self._uploads = Uploads(state.device.transfers, self._finish_upload)
        self._deferred: Fault | None = None  # of a request without reply; answers the next one that has one
        self._refusal: Fault | None = None  # why the payload of the frame just received was dropped
        self._offers = Offers(state.weights, state.checkpoints, self._uploads, self._store)
        self._cpu_at_start = time.process_time()
        self._gpu: GpuMeter | None = None  # once the client has asked
        self._authenticated = False

    # -- the loop --------------------------------------------------------------------------------

    def serve(self) -> None:
        torch.set_grad_enabled(False)  # of this thread, as the next one is
        self._state.device.use_here()
        try:
            self._handshake()
            self._loop()
        except PeerClosedError as exc:
            log.info("%s: %s", self.name, exc)
        except GenieError as exc:
            log.warning("%s: closed: %s", self.name, exc)
            self._refuse(Fault(type(exc).__name__, str(exc)))
        except OSError as exc:
            log.warning("%s: connection lost: %s", self.name, exc)
        finally:
            self._state.sessions.pop(self.number, None)
            self._channel.close()
            self._peers.close()
            self._uploads.clear()
            self._executor.ahead.drop()
            self._store.clear()
            self._offers.clear()
            self._executor.templates.clear()

    def abort(self) -> None:
        """Called by another thread when the server stops."""
        self._channel.abort()
        self._peers.abort()

    def _handshake(self) -> None:
        channel, state = self._channel, self._state
        channel.settimeout(HANDSHAKE_SECONDS)
        channel.max_header = HANDSHAKE_HEADER
        nonce = auth.new_nonce()
        channel.send(Challenge(PROTOCOL_VERSION, nonce))
        message, _ = channel.receive(max_payload=0)
        if not isinstance(message, Auth):
            raise ProtocolError(f"a session starts with Auth, not {type(message).__name__}")
        if message.version != PROTOCOL_VERSION:
            raise ProtocolError(
                f"the client speaks protocol version {message.version}, this server {PROTOCOL_VERSION}: "
                "install the same version of Genie on both"
            )
        if not auth.same_mac(message.mac, auth.client_mac(state.token, nonce)):
            raise AuthError(
                "the server refused the token: give the one it was started with "
                f"({auth.TOKEN_VARIABLE} or a token file)"
            )
        self._authenticated = True
        device = state.device
        channel.send(
            Welcome(
                mac=auth.server_mac(state.token, message.nonce),
                pid=device.pid,
                device=device.name,
                device_type=device.torch_device.type,
                torch_version=str(torch.__version__),
                session=self.number,
                memory_limit=state.memory_limit,
                facts=device.facts,
                max_templates=state.max_templates,
            )
        )
        channel.settimeout(None)
        channel.max_header = MAX_HEADER
        state.sessions[self.number] = self
        log.info("%s: open", self.name)

    def _loop(self) -> None:
        channel = self._channel
        receive, send, allocate = channel.receive, channel.send, self._allocate
        execute, ahead = self._executor.execute, self._executor.ahead
        uploads = self._uploads.waiting
        while True:
            if uploads and self._uploads.may_settle(channel):
                self._settle()  # other sessions may want these contents
            # What was asked for goes first.
            while ahead.is_due and not channel.has_more() and ahead.step():
                pass
            message, payload = receive(allocate)
            if uploads and type(payload) is not Landing:
                self._settle()
            refusal, self._refusal = self._refusal, None
            if self._state.device.lost:
                refusal = self._lost()
            kind = type(message)
            try:
                if kind is Execute:
                    trace = self._executor.trace
                    if trace is not None:
                        trace.received(message.nonce, message.body is not None)
                    deferred, self._deferred = self._deferred or refusal, None
                    result, pieces, owners = execute(message, payload, deferred)
                    if not isinstance(result, Result):
                        self._executor.receipts.keep(message.template, result)
                    else:
                        result.earlier = self._executor.take_receipts(result.receipt.nonce)
                        send(result, pieces)
                    if trace is not None:
                        trace.finished()
                    del result, pieces, owners
                    if ahead.windows:
                        ahead.saw(message)
                elif kind in ONE_WAY:
                    ahead.interrupt()
                    self._one_way(message, payload, refusal)
                elif kind is Bye:
                    log.info("%s: closed by the client", self.name)
                    return
                else:
                    if kind not in HARMLESS:
                        ahead.interrupt()
                    send(self._answer(message, refusal))
            except (Fault, RuntimeError) as exc:
                # What failed on the device may be told only now, by whoever waits for it.
                fault = exc if isinstance(exc, Fault) else fault_of(exc, device=self._state.device.name)
                self._note(fault)
                ahead.interrupt()
                if kind is Execute and message.quiet:
                    self._deferred = fault
                else:
                    send(fault.to_wire(self._state.log_tail()))
                    self._executor.receipts.drop()
                if kind is Execute and trace is not None:
                    trace.finished(failed=True)
            # A payload that the session does not hold must not live until the next frame arrives.
            payload = EMPTY

    def _allocate(self, message: ClientMessage, nbytes: int) -> Tensor | Landing | None:
        """Memory for a payload, or None when it is to be read and dropped; the request then fails."""
        try:
            if self._state.device.lost:
                return None  # as the request will be told
            if isinstance(message, Upload):
                expected = dense_nbytes(message.spec)
                if expected != nbytes:
                    raise ProtocolError(
                        f"upload of {message.spec} needs {expected} bytes, but came with {nbytes}"
                    )
            elif isinstance(message, Ping):
                return None
            elif not isinstance(message, Execute):
                raise ProtocolError(
                    f"{type(message).__name__} takes no payload, but came with {nbytes} bytes"
                )
            self._executor.ahead.interrupt()  # what nobody asked for makes room
            self._store.reserve(nbytes + self._uploads.nbytes)
            if isinstance(message, Upload):
                return self._uploads.landing(nbytes, checked=message.digest is not None)
            return self._state.device.new_payload(nbytes)
        except (GenieError, RuntimeError, MemoryError) as exc:
            self._refusal = fault_of(exc, device=self._state.device.name)
            return None

    def _settle(self) -> None:
        try:
            self._uploads.settle()
        except RuntimeError as exc:
            fault = fault_of(exc, device=self._state.device.name)
            self._note(fault)
            self._deferred = self._deferred or fault

    def _note(self, fault: Fault) -> None:
        log.warning("%s: %s: %s", self.name, fault.error, fault.message)
        if fault.error == DeviceLostError.__name__:
            self._state.device.lose(fault.message)

    def _lost(self) -> Fault:
        return Fault(DeviceLostError.__name__, self._state.device.lost)

    def _refuse(self, fault: Fault) -> None:
        """Tells the client why its session is closed, and reads on a little: closing a socket with
        unread bytes would reset the connection and could destroy the message on its way."""
        try:
            self._channel.settimeout(LINGER_SECONDS)
            # The log is not for strangers.
            self._channel.send(fault.to_wire(self._state.log_tail() if self._authenticated else ""))
            self._channel.linger()
        except OSError as exc:
            log.info("%s: the client did not wait for the reason: %s", self.name, exc)

    # -- requests --------------------------------------------------------------------------------

    def _answer(self, message: ClientMessage, refusal: Fault | None) -> Any:
        if isinstance(message, Counters):
            # Answers even a poisoned session: the harness reads it after a failure, too.
            channel = self._channel
            self._peers.settle()
            return CountersReply(
                bytes_in=channel.frame_start,
                bytes_out=channel.bytes_out,
                cpu_s=time.process_time() - self._cpu_at_start,
                held_bytes=self._store.held_bytes,
                handles=len(self._store),
                templates=len(self._executor.templates),
                earlier=self._executor.take_receipts(),
                peer_in=self._peers.bytes_in,
                peer_out=self._peers.bytes_out,
            )
        if isinstance(message, Ping) and self._state.device.lost:
            refusal = None  # the process answers; what failed before is told all the same
        elif self._state.device.lost:
            raise self._lost()
        if isinstance(message, ReadGpu):
            return self._read_gpu(message)
        if isinstance(message, Load):
            try:
                return load_of(self._state.device, list(self._state.sessions.values()))
            except RuntimeError as exc:
                raise fault_of(exc, device=self._state.device.name) from exc
        # A session that lost its group may form another, whatever else waits to be told.
        try:
            if isinstance(message, PeerListen):
                return self._peers.listen()
            if isinstance(message, PeerJoin):
                return self._peers.join(message)
        except GenieError as exc:
            raise fault_of(exc) from exc
        if isinstance(message, Trace):
            return self._trace(message)
        fault, self._deferred = self._deferred or refusal, None
        if fault is not None:
            raise fault
        if isinstance(message, Ping):
            return Pong()
        if isinstance(message, Offer):
            try:
                return self._offers.answer(message)
            except ProtocolError as exc:
                raise fault_of(exc) from exc
        raise Fault("ProtocolError", f"{type(message).__name__} cannot come in the middle of a session")

    def _read_gpu(self, m: ReadGpu) -> GpuReading:
        meter = self._gpu
        if meter is None:
            meter = self._gpu = GpuMeter(self._state.device.torch_device)
            meter.start()
        reply = GpuReading(meter.read(), "" if meter.has_gpu else meter.why)
        if m.start:
            meter.start()
        return reply

    def _trace(self, m: Trace) -> TraceReply:
        now = time.perf_counter_ns()
        executor = self._executor
        reply = TraceReply(now, earlier=executor.take_receipts())
        if executor.trace is not None:
            reply.requests, reply.op_names, reply.dropped = executor.trace.take()
        if not m.on:
            executor.trace = None
        elif executor.trace is None:
            executor.trace = SessionTrace(m.ops, m.limit, self._state.device.synchronize)
        return reply

    def add_sizes(self, sizes: dict[int, int]) -> int:
        """As `HandleStore.add_sizes`, with what is under way from other servers and the client. Any thread
        may call it."""
        return self._store.add_sizes(sizes) + self._peers.held_bytes + self._uploads.nbytes

    def _one_way(
        self,
        message: Configure | Upload | Adopt | Release | Expect | Send,
        payload: Tensor | Landing,
        refusal: Fault | None,
    ) -> None:
        """A failure is kept for the next request that has a reply, and poisons the handle that the message
        was to bind."""
        if isinstance(message, Release):
            if refusal is None:
                self._store.free(message.handles)
            else:
                self._deferred = self._deferred or refusal
            return
        try:
            if refusal is not None:
                raise refusal
            if isinstance(message, Configure):
                self._executor.configure(message)
            elif isinstance(message, Adopt):
                self._adopt(message)
            elif isinstance(message, Expect):
                self._peers.expect(message)
            elif isinstance(message, Send):
                self._peers.send(message)
            else:
                self._upload(message, payload)
        except Exception as exc:  # noqa: BLE001 - it answers the next request, and is logged
            self._fail(message, exc)

    def _fail(self, message: Configure | Upload | Adopt | Expect | Send, exc: Exception) -> None:
        fault = fault_of(exc, device=self._state.device.name)
        self._note(fault)
        if not isinstance(message, (Configure, Send)):
            self._store.poison([message.handle], Fault(*fault.args))
        self._deferred = self._deferred or Fault(*fault.args)

    def _upload(self, m: Upload, payload: Tensor | Landing) -> None:
        if not isinstance(payload, Landing):  # none came: that is right for a tensor without elements
            expected = dense_nbytes(m.spec)
            if expected:
                raise ProtocolError(f"upload of {m.spec} needs {expected} bytes, but came without any")
            payload = self._uploads.landing(0, checked=m.digest is not None)
        self._uploads.add(m, payload)

    def _finish_upload(self, m: Upload, landing: Landing) -> None:
        """Binds a content that is here; it is checked and copied by now, or else this waits for that."""
        try:
            storage, digest = landing.finish()
            if digest != m.digest:
                raise ProtocolError(
                    f"the bytes uploaded for handle {m.handle} do not have the digest that came with them"
                )
            if m.digest is not None:
                storage = self._state.weights.add(m.digest, storage)
            self._bind_upload(m.handle, storage, m.spec, shared=m.digest is not None)
        except Exception as exc:  # noqa: BLE001 - as in `_one_way`
            self._fail(m, exc)

    def _adopt(self, m: Adopt) -> None:
        expected = dense_nbytes(m.spec)
        storage = self._offers.take(m.digest, expected)
        self._store.reserve(0 if self._store.holds(storage) else expected)
        self._bind_upload(m.handle, storage, m.spec, shared=True)

    def _bind_upload(
        self, handle: int, storage: torch.UntypedStorage, spec: TensorSpec, *, shared: bool
    ) -> None:
        tensor = over_storage(storage, spec, DTYPES[spec.dtype])
        self._store.bind(handle, tensor, shared=shared, uploaded=True)
