"""Every exception that Genie raises, on one page. Each message names the remedy."""


class GenieError(Exception):
    """Base of all errors raised by Genie."""


class ConfigError(GenieError):
    """An option or an environment variable is wrong, or asks for something this machine lacks."""


class UnsupportedOpError(GenieError, NotImplementedError):
    """An operation that device ``genie`` cannot capture, or that the server does not allow."""


class StaleGraphError(GenieError):
    """A compiled graph was called with an argument that had changed in a way its guards do not see."""


class SessionClosedError(GenieError):
    """A tensor or a session was used after its session had ended."""


class ParameterInUseError(GenieError, RuntimeError):
    """A module cannot move to or from device ``genie``: an autograd graph, or a view, holds a parameter."""


class RemoteError(GenieError):
    """A server failed to do what the client asked; carries the server's log tail."""

    def __init__(self, message: str, log_tail: str = "") -> None:
        self.log_tail = log_tail
        super().__init__(f"{message}\n--- server log ---\n{log_tail}" if log_tail else message)


class ConnectError(RemoteError):
    """A server could not be reached, or its port is taken."""


class AuthError(RemoteError):
    """The server refused the token (or an insecure bind was asked for without saying so)."""


class ProtocolError(RemoteError):
    """A frame or a message violates the wire protocol."""


class ServerLostError(RemoteError):
    """The connection to a server ended in the middle: it was killed, or it crashed."""


class RemoteOpError(RemoteError):
    """An operation raised on the server; the message holds the op and the Python line that recorded it."""


class OutOfMemoryError(RemoteError):
    """The server's device, or the session's quota, has no memory left for a request."""


class DeviceLostError(RemoteError):
    """The server's GPU, or its CUDA context, is gone; whatever sessions held there is, too."""


class PeerError(RemoteError):
    """A tensor could not move between two servers: one is lost, or they cannot reach each other."""


class PlanError(GenieError):
    """A scheduling policy raised, or returned a plan that cannot be carried out; the message names the
    policy and the instruction or edge."""


class MeasurementError(GenieError):
    """A measured cell cannot be believed (failed verification, missing receipt, bytes that disagree)."""


class VerificationError(MeasurementError):
    """A timed result differs from ``local_pytorch`` on the same inputs."""


class ReceiptError(MeasurementError):
    """A remote result came without proof that another process computed it."""


class WireCountError(MeasurementError):
    """Socket counters of the two ends disagree, or fewer bytes crossed than the workload needs."""


class ResultError(GenieError):
    """A result file cannot be read: missing, truncated, not ours, or of another schema version."""


class CannotCompareError(GenieError):
    """Two results, or two revisions, have nothing that may be compared; the message names the difference."""
