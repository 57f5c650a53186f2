"""The byte oracle: for each workload and baseline, a closed form of what must cross the wire at least.

With ``I`` the bytes of the request's input tensors, ``O`` those of its output tensors, and ``S``
the live state summed over the program's syncs (the KV cache at each generated token):

    baseline                                  out at least    in at least
    local_pytorch, genie_capture_only         exactly 0       exactly 0
    genie_local_remote, genie_full            I               O
    pytorch_rpc, ray                          I               O
    genie_no_semantics, and genie_full
    with residency or colocation ablated      I + S           O + S

A run that moved less cannot have done the work in another process, or kept state where its features
say that none is kept. There is no upper bound here: what a runtime moves beyond this is what the
suite measures.
"""

from __future__ import annotations

from dataclasses import dataclass

from genie.baselines.protocol import Wire
from genie.errors import WireCountError
from genie.workloads.protocol import Request, Workload


@dataclass(frozen=True)
class LeastBytes:
    """Lower bounds for one request; ``exact`` where they are equalities (nothing may cross).

    ``state`` is the part of each that is live state which may not stay on a server.
    """

    out: int
    into: int
    exact: bool = False
    state: int = 0


def least_bytes(
    workload: Workload, request: Request, output_bytes: int, *, remote: bool, stateless: bool
) -> LeastBytes:
    """``stateless``: no result may stay on a server (see ``genie.bench.features.is_stateless``)."""
    if not remote:
        return LeastBytes(0, 0, exact=True)
    inputs = sum(tensor.nbytes for tensor in request.inputs.values())
    state = workload.state_bytes(request) if stateless else 0
    return LeastBytes(out=inputs + state, into=output_bytes + state, state=state)


def check_bytes(wire: Wire, least: LeastBytes, where: str) -> None:
    """Raises WireCountError when the counted bytes contradict the closed form."""
    if least.exact:
        if wire.bytes_out or wire.bytes_in or wire.peer_bytes:
            raise WireCountError(
                f"{where}: runs in this process, but {wire.bytes_out} bytes went out, {wire.bytes_in} came in"
            )
        return
    for direction, counted, needed in (
        ("out", wire.bytes_out, least.out),
        ("in", wire.bytes_in, least.into),
    ):
        if counted < needed:
            stays = f"{least.state} bytes of state stayed where none may, " if least.state else ""
            raise WireCountError(
                f"{where}: {counted} bytes counted {direction}, but the request needs at least {needed}: "
                f"{stays}the work was not done on the other side, or the counter misses a socket"
            )
