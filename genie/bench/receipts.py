"""Believing a reply: receipts must come from another process, and both ends must count the same bytes."""

from __future__ import annotations

import os
from collections.abc import Collection
from typing import TYPE_CHECKING

from genie.errors import ReceiptError, WireCountError

if TYPE_CHECKING:
    from genie.baselines.protocol import Reply, Wire

#: kernel counters of a peer's sockets also see its keep-alives; this much may differ between the ends
PEER_SLACK_BYTES = 4096
PEER_SLACK_SHARE = 0.01


class ReceiptBook:
    """Every nonce seen in this run. A nonce that comes twice is an answer that was not computed."""

    def __init__(self) -> None:
        self._nonces: set[str] = set()

    def note(self, reply: Reply) -> None:
        """Remembers the nonces of an untimed request, so that its answer cannot come back on the clock."""
        self._nonces |= {receipt.nonce for receipt in reply.receipts}

    def check(
        self, reply: Reply, *, remote: bool, counts_ops: bool, server_pids: Collection[int], where: str
    ) -> None:
        """Raises ReceiptError unless ``reply`` proves where it was computed.

        ``counts_ops`` holds for Genie's own servers, which must report executed ops.
        ``server_pids`` are the processes that the pool started; empty where they are not known.
        """
        receipts = reply.receipts
        if not remote:
            if receipts:
                raise ReceiptError(
                    f"{where}: runs in this process, but brought a receipt of pid {receipts[0].pid}"
                )
            return
        if not receipts:
            raise ReceiptError(f"{where}: no receipt: nothing proves that another process did this request")
        for receipt in receipts:
            if receipt.pid == os.getpid():
                raise ReceiptError(f"{where}: the receipt names this very process (pid {receipt.pid})")
            if server_pids and receipt.pid not in server_pids:
                raise ReceiptError(
                    f"{where}: the receipt is of pid {receipt.pid}, which is none of the pool's servers "
                    f"({', '.join(map(str, sorted(server_pids)))})"
                )
            if not receipt.nonce:
                raise ReceiptError(
                    f"{where}: the receipt of pid {receipt.pid} does not echo the request's nonce"
                )
        if counts_ops and sum(receipt.ops or 0 for receipt in receipts) < 1:
            raise ReceiptError(f"{where}: the servers report no executed op for this request")
        nonces = {receipt.nonce for receipt in receipts}
        repeated = nonces & self._nonces
        if repeated:
            raise ReceiptError(
                f"{where}: nonce {sorted(repeated)[0]} was seen before: an old answer came back"
            )
        self._nonces |= nonces


def slack_bytes(counted: int, *, exact: bool) -> int:
    """How far two counts of the same bytes may lie apart."""
    return 0 if exact else max(PEER_SLACK_BYTES, int(PEER_SLACK_SHARE * counted))


def check_both_ends(wire: Wire, *, exact: bool, where: str) -> None:
    """Raises WireCountError where the servers' counters are known and differ from the client's."""
    for direction, client, server in (
        ("client to server", wire.bytes_out, wire.server_in),
        ("server to client", wire.bytes_in, wire.server_out),
    ):
        if server is None:
            continue
        if abs(client - server) > slack_bytes(client, exact=exact):
            raise WireCountError(
                f"{where}: {direction}, the client counted {client} bytes and the servers {server}"
            )
    if wire.peer_in is not None and wire.peer_in != wire.peer_bytes:
        raise WireCountError(
            f"{where}: between servers, {wire.peer_bytes} bytes were sent and {wire.peer_in} received"
        )
