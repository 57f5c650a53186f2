"""Everything that can go wrong while serving one request, as one exception that knows its wire form."""

from __future__ import annotations

import logging
from collections import deque

import torch

from genie import errors
from genie.errors import GenieError
from genie.server.engine import EngineError
from genie.wire.messages import Error

log = logging.getLogger("genie.server")

LOG_TAIL_LINES = 40
#: what CUDA says (cudaGetErrorString) when the context cannot be used any more: errors 46, 201, 214, 220,
#: 700, 702, 709, 710, 714-719 and 999 of CUDA 12. Others, like an invalid argument, leave it as it was.
LOST = (
    "busy or unavailable",
    "invalid device context",
    "uncorrectable ECC error",
    "uncorrectable NVLink error",
    "an illegal memory access was encountered",
    "the launch timed out and was terminated",
    "context is destroyed",
    "device-side assert triggered",
    "hardware stack error",
    "an illegal instruction was encountered",
    "misaligned address",
    "operation not supported on global/shared address space",
    "invalid program counter",
    "unspecified launch failure",
    "unknown error",
)


class Fault(Exception):
    """A typed error on its way to the client. ``nonce`` and ``instruction`` name the Execute and the
    instruction that failed first, also when a later request meets a handle that it poisoned."""

    def __init__(self, error: str, message: str, nonce: str = "", instruction: int = -1) -> None:
        super().__init__(error, message, nonce, instruction)
        self.error, self.message, self.nonce, self.instruction = error, message, nonce, instruction

    def to_wire(self, log_tail: str) -> Error:
        return Error(self.error, self.message, log_tail, self.nonce, self.instruction)


def fault_of(exc: BaseException, *, nonce: str = "", device: str = "") -> Fault:
    """The fault that tells the client about ``exc``; an exception that nobody foresaw is logged whole."""
    if isinstance(exc, Fault):
        return exc
    if isinstance(exc, EngineError):
        cause = exc.__cause__ or exc
        if is_device_lost(cause):
            return Fault("DeviceLostError", _lost(cause, device, exc.op), nonce, exc.instruction)
        if _is_out_of_memory(cause):
            return Fault("OutOfMemoryError", _no_memory(cause, device, exc.op), nonce, exc.instruction)
        if isinstance(cause, GenieError):
            return Fault(type(cause).__name__, str(cause), nonce, exc.instruction)
        text = f"{exc.op} raised {type(cause).__name__} on {device} (instruction {exc.instruction}): {cause}"
        return Fault("RemoteOpError", text, nonce, exc.instruction)
    if isinstance(exc, GenieError):
        return Fault(type(exc).__name__, str(exc), nonce)
    if is_device_lost(exc):
        return Fault("DeviceLostError", _lost(exc, device, "the request"), nonce)
    if _is_out_of_memory(exc):
        return Fault("OutOfMemoryError", _no_memory(exc, device, "the request"), nonce)
    log.error("unforeseen failure of a request", exc_info=exc)
    text = f"the server failed on this request: {type(exc).__name__}: {exc} (see its log; please report it)"
    return Fault(errors.RemoteError.__name__, text, nonce)


def is_device_lost(exc: BaseException) -> bool:
    """Whether every later call of the device will fail, too: its CUDA context is gone."""
    if isinstance(exc, EngineError) and exc.__cause__ is not None:
        exc = exc.__cause__
    if not isinstance(exc, RuntimeError) or isinstance(exc, torch.OutOfMemoryError):
        return False
    text = str(exc)
    # All that torch raises of CUDA says so, as torch.AcceleratorError where that exists.
    return "CUDA" in text and any(t in text for t in LOST)


def _lost(exc: BaseException, device: str, what: str) -> str:
    reason = (str(exc).splitlines() or [type(exc).__name__])[0]
    return (
        f"{device or 'the device'} was lost during {what}: {reason}. Restart the server; what it held "
        "is gone. Its log and dmesg (NVRM: Xid) say more; after an assertion, look for an index out of bounds"
    )


def _is_out_of_memory(exc: BaseException) -> bool:
    if isinstance(exc, (MemoryError, torch.OutOfMemoryError)):
        return True
    text = str(exc) if isinstance(exc, RuntimeError) else ""
    # What the CPU allocator says, and what sizes beyond any address space say before it is asked.
    return any(
        t in text
        for t in ("DefaultCPUAllocator", "CUDA out of memory", "Storage size calculation overflowed")
    )


def _no_memory(exc: BaseException, device: str, what: str) -> str:
    return (
        f"{device} has no memory left for {what}: {exc}. Free tensors, use smaller batches, or another server"
    )


class TailHandler(logging.Handler):
    """Keeps the last lines of the log in memory, so that an error can carry them."""

    def __init__(self) -> None:
        super().__init__()
        self._lines: deque[str] = deque(maxlen=LOG_TAIL_LINES)

    def emit(self, record: logging.LogRecord) -> None:
        self._lines.extend(self.format(record).splitlines())

    def tail(self) -> str:
        return "\n".join(self._lines)
