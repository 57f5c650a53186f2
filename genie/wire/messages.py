"""Typed headers of every frame. Raw tensor bytes follow the header; nothing is ever pickled.

A conversation: the server sends `Challenge` as soon as the connection opens, the client answers
`Auth`, the server answers `Welcome` (or `Error` and closes). After that the client sends requests;
the server handles them one by one in order. `Upload`, `Adopt` and `Release` have no reply of their
own (nor have `Configure`, `Expect` and `Send`): a failure is kept and answers the next request that has one
(the client's later results are poisoned by *that* error). All others are answered by exactly one message,
or by `Error`.

Handles are 64-bit ints chosen by the client; a session owns its own and sees no other's.
"""

from __future__ import annotations

import msgspec

from genie.device_facts import DeviceFacts
from genie.gpu_meter import GpuUse

PROTOCOL_VERSION = 5
#: predictions that one template may have (see `Execute`)
MAX_LANES = 32


class Message(msgspec.Struct, array_like=True, tag=True, forbid_unknown_fields=True):
    """Base of all headers; the tag is the class name."""


class TensorSpec(msgspec.Struct, array_like=True, frozen=True):
    """Geometry of one tensor. ``stride`` and ``offset`` count elements of ``dtype``.

    ``storage`` indexes the frame's storages (see `Execute.storages`), or is -1 when the tensor is
    dense and alone in the payload (its bytes are the elements in memory order of ``stride``).
    """

    dtype: str  # "float32": the torch attribute's name
    shape: list[int]
    stride: list[int]
    offset: int = 0
    storage: int = -1


class Challenge(Message):
    version: int
    nonce: bytes


class Auth(Message):
    version: int
    mac: bytes  # HMAC-SHA256(token, b"client" + challenge nonce)
    nonce: bytes  # the server must prove the token too


class Welcome(Message):
    mac: bytes  # HMAC-SHA256(token, b"server" + client nonce)
    pid: int
    device: str  # "cpu:0 AMD EPYC" or "cuda:0 NVIDIA H200": type, index and model
    device_type: str  # "cpu" | "cuda"
    torch_version: str
    session: int
    memory_limit: int  # bytes this session may hold; 0 = no limit
    facts: DeviceFacts
    max_templates: int = 1024  # programs that this session may have defined at a time


class Configure(Message):
    """How the session's programs are to be run; without it op by op, when they are asked for. No reply.

    ``engines``: of `genie.config.ENGINES`, what the server may use beside that. ``run_ahead``: windows
    (requests up to the next reply) that it may run before they are asked for; 0 to
    `genie.config.MAX_RUN_AHEAD`."""

    engines: list[str]
    run_ahead: int


class Ping(Message):
    """Empty round trip; a payload is read and dropped (for measuring bandwidth)."""


class Pong(Message):
    pass


class Offer(Message):
    """Contents that the client could upload: digests (`genie.wire.digest`) and sizes in bytes."""

    digests: list[bytes]
    nbytes: list[int]


class Wanted(Message):
    """Indices into the offer that the server does not have."""

    missing: list[int]


class Upload(Message):
    """One dense tensor as payload. No reply. With a digest the server checks it and shares the
    content with all sessions, read-only: an op that writes to it gets a private copy first."""

    handle: int
    spec: TensorSpec
    digest: bytes | None = None


class Adopt(Message):
    """Binds a handle to content that the server already has. No reply."""

    handle: int
    spec: TensorSpec
    digest: bytes


class Release(Message):
    """Frees handles. No reply."""

    handles: list[int]


class PeerListen(Message):
    """The server is to be the meeting point of a group of servers, among which tensors can move."""


class PeerAddress(Message):
    """Where the others find it: the group's store."""

    host: str
    port: int


class PeerJoin(Message):
    """Joins the session to a group: this server is number ``rank`` of ``world``. Answered once all have
    joined; so it must be sent to all before any answer is read. A second join leaves the first group.
    ``timeout_s``: for joining, and for each transfer. Raises PeerError."""

    host: str
    port: int
    rank: int
    world: int
    timeout_s: float


class PeerJoined(Message):
    backend: str  # "gloo" | "nccl"


class Expect(Message):
    """Binds a handle to a tensor that server ``source`` (a rank of the group) will send under ``tag``. No
    reply, no waiting: the first use of the handle waits. What fails there poisons the handle. With a digest
    the content is checked, and shared as if it had been uploaded. Between two servers the order of `Expect`
    on one must be that of `Send` on the other."""

    handle: int
    spec: TensorSpec
    source: int
    tag: int
    digest: bytes | None = None


class Send(Message):
    """Sends a handle's content as it is now, laid out as ``spec`` says, to server ``target``. No reply, no
    waiting. ``narrow``: (dimension, start, length) of what is to be sent; ``spec`` is that of the part. A
    poisoned handle sends its error."""

    handle: int
    spec: TensorSpec
    target: int
    tag: int
    narrow: tuple[int, int, int] | None = None


class Load(Message):
    """Asks how busy the server is, all sessions together."""


class LoadReply(Message):
    sessions: int
    held_bytes: int  # by all sessions; shared contents once
    busy_s: float  # seconds of executing programs since the server started
    memory_total: int  # bytes of the device's memory (of the host's for a CPU)
    memory_free: int


class OpDef(msgspec.Struct, array_like=True, frozen=True):
    """One op with its argument pattern; ``tid`` is the client's number for it in this session.

    ``args``/``kwargs`` hold patterns: ``["t"]`` tensor, ``["tl", n]`` list of n tensors, ``["ol", [0, 1]]``
    list of optional tensors (1 = present), ``["i"]`` int from the literal vector, ``["il", n]`` list of n
    such ints, ``["f"]`` float from the float vector, ``["fl", n]`` list of n such floats, ``["n"]`` None,
    ``["b", bool]``, ``["s", str]``, ``["dt", name]`` dtype, ``["mf", name]`` memory format,
    ``["ly", name]`` layout, ``["dev"]`` the server's device, ``["bl", [bool, ...]]``, ``["c", re, im]``.
    ``outs``: per flattened output -1 for a new tensor, k >= 0 when it *is* the k-th tensor
    argument (in-place), -2 for an undefined tensor.
    """

    tid: int
    op: str  # "aten::add.Tensor", overload always spelled ("default" if empty)
    args: list
    kwargs: dict[str, list]
    outs: list[int]


class TemplateBody(msgspec.Struct, array_like=True, frozen=True):
    """A program without its literals: what the server compiles once.

    ``code``: int32 LE: for each instruction its tid, then one slot per tensor argument in pattern
    order. A slot >= 0 is the value made by the program (numbered as made, new tensors only);
    -(k+1) is the k-th external handle. ``kept``: int32 LE slots that outlive the program.
    """

    defs: list[OpDef]  # definitions that this session has not sent before
    code: bytes
    n_ext: int
    n_slots: int
    kept: bytes
    #: (slot, its dimensions from the outermost in): values that must be dense in just this order. A
    #: replayed program has other sizes from run to run, so its layouts cannot be checked once.
    layouts: list[tuple[int, list[int]]] = []
    replay: bool = False  # lowered from a compiled graph, not recorded op by op
    #: int32 LE, as many as ``kept``: kept slot number i is bound to handle ``base + names[i]``. Empty: the
    #: names are the slots. A part of a program keeps the names that its values have in the whole.
    names: bytes = b""


class Check(msgspec.Struct, array_like=True, frozen=True):
    """Predicted specs of one instruction's new outputs, sent the first time an entry is used."""

    instruction: int
    specs: list[TensorSpec]


class Execute(Message):
    """Runs one program, then answers `Result` (unless ``quiet``). Every part but the nonce may be empty.

    Order of work on the server: forget ``evict`` templates; free ``release``; bind ``inputs``
    from the payload; run template ``template`` (``body`` comes along the first time); bind kept
    slot s to handle ``base + s``; read ``fetch`` into the reply; free ``release_after`` and the releases
    among ``vectors``.

    ``vectors``: the template's literals, floats, external handles and releases, as the residual of a
    prediction (`genie.wire.vectors`). Each template has up to `MAX_LANES` predictions; ``lane`` is the
    one to use, so that the client can keep apart the places where a request runs the same template.
    A body starts its template's predictions anew, an eviction ends them; whatever becomes of the
    program, its vectors count.

    Payload: the ``storages`` first, then the dense inputs in order, each piece at the next multiple of
    64 bytes (see genie.wire.framing). A reply's payload likewise: its storages, then what it fetched.

    ``stateless``: the reply holds *every* live result (kept slots and externals written to), as
    unique storages with geometry, and the server then forgets all but what was uploaded by
    `Upload`/`Adopt`: nothing told it what is state.
    """

    nonce: str
    template: int = -1
    body: TemplateBody | None = None
    vectors: bytes = b""
    lane: int = 0
    base: int = 0
    inputs: list[tuple[int, TensorSpec]] = []
    storages: list[int] = []  # bytes of each storage in the payload, for inputs that share one
    fetch: list[int] = []
    describe: list[int] = []  # handles whose true specs the reply must state
    checks: list[Check] = []
    release: bytes = b""  # int64 LE handles
    release_after: bytes = b""  # int64 LE handles, of a request without a template
    evict: list[int] = []
    stateless: bool = False
    first: int = 0  # the client's number of the program's first instruction: errors count from it
    quiet: bool = False  # no reply: receipt or error come with the next request that has one


class Relayout(msgspec.Struct, array_like=True, frozen=True):
    """The server found output ``output`` of ``instruction`` laid out otherwise than predicted and
    copied it into the predicted layout; ``stride`` is what the device really makes."""

    instruction: int
    output: int
    stride: list[int]


class LiveValue(msgspec.Struct, array_like=True, frozen=True):
    """One live result of a stateless program. ``spec.storage`` >= 0 indexes the payload's storages;
    -2: the bytes are those of the uploaded handle ``resident``, which the client already has."""

    handle: int
    spec: TensorSpec
    resident: int = 0


class ProgramReceipt(msgspec.Struct, array_like=True, frozen=True):
    """What the server did for one `Execute`."""

    pid: int
    device: str
    nonce: str
    ops: int
    digest: bytes  # SHA-256 of the template's body as the server holds it
    remote_ms: float  # execution, device synchronized
    cpu_s: float  # CPU-seconds of the server process
    counters: dict[str, int]


class BriefReceipt(msgspec.Struct, array_like=True, frozen=True):
    """The receipt of a quiet program, without what the client has been told (`genie.wire.receipts`)."""

    template: int
    remote_ns: int
    cpu_ns: int
    counters: dict[str, int] = {}
    nonce: str | None = None  # None: as in the receipt before, or at first that of the reply
    #: ops and digest of the template; None: as told for this template before
    work: tuple[int, bytes] | None = None


class Result(Message):
    receipt: ProgramReceipt
    fetched: list[TensorSpec] = []  # in the order of Execute.fetch; payload in the same order
    described: list[TensorSpec] = []
    relayouts: list[Relayout] = []
    live: list[LiveValue] = []
    storages: list[int] = []  # bytes of each storage in the payload (stateless only)
    earlier: list[BriefReceipt] = []  # of the quiet programs since the last reply


class Counters(Message):
    """Asks for this session's socket counters as they stood before this message."""


class CountersReply(Message):
    bytes_in: int
    bytes_out: int
    cpu_s: float
    held_bytes: int
    handles: int
    templates: int
    earlier: list[BriefReceipt] = []  # of the quiet programs since the last reply
    peer_in: int = 0  # bytes of tensors received from other servers
    peer_out: int = 0


class ReadGpu(Message):
    """Asks what the server's GPU was used since the last one with ``start``, all sessions together; with
    ``start`` that begins anew afterwards. Answered even when an earlier request failed."""

    start: bool


class GpuReading(Message):
    use: GpuUse | None  # None without a GPU
    why: str = ""  # of a server without one


class Trace(Message):
    """While ``on``, the server remembers when it received, ran and answered each `Execute` of this
    session (with ``ops``: each instruction, the device synchronized after each), up to ``limit`` of
    both together. Programs are numbered from 1 since it was switched on. Answered even when an
    earlier request failed, so that the clocks can be compared at any time."""

    on: bool
    ops: bool = False
    limit: int = 0


class RequestTrace(msgspec.Struct, array_like=True, frozen=True):
    """One `Execute`. All times by the server's monotonic clock, in ns; 0 for what did not happen."""

    number: int
    nonce: str
    first_sight: bool  # its template came with it, and was compiled before it ran
    failed: bool
    ops: int
    template: str  # first 12 hex digits of the receipt's digest
    received_ns: int  # the whole frame is here
    started_ns: int
    ended_ns: int
    finished_ns: int  # answered, or (quiet) all is done
    op_ns: bytes = b""  # int64 LE: the start of the first instruction, then the end of each


class TraceReply(Message):
    clock_ns: int  # the server's monotonic clock, when it read the request
    requests: list[RequestTrace] = []  # since the last reply
    op_names: dict[str, list[str]] = {}  # by template, of those among ``requests``, if ops were timed
    dropped: int = 0  # requests beyond the limit
    earlier: list[BriefReceipt] = []  # of the quiet programs since the last reply


class Bye(Message):
    """Ends the session; the server frees everything and closes."""


class Error(Message):
    """``error`` is a class name of genie.errors. ``instruction`` >= 0 names the failing one, of the
    Execute with this ``nonce``: the one that failed first, also when a later request met a handle
    that it poisoned."""

    error: str
    message: str
    log_tail: str = ""
    nonce: str = ""
    instruction: int = -1


ClientMessage = (
    Auth
    | Configure
    | Ping
    | Offer
    | Upload
    | Adopt
    | Release
    | Execute
    | Counters
    | ReadGpu
    | Trace
    | PeerListen
    | PeerJoin
    | Expect
    | Send
    | Load
    | Bye
)
ServerMessage = (
    Challenge
    | Welcome
    | Pong
    | Wanted
    | Result
    | CountersReply
    | GpuReading
    | TraceReply
    | PeerAddress
    | PeerJoined
    | LoadReply
    | Error
)
