"""Receipts of quiet programs, without what the client has been told already.

A session has one pid and one device, and a template always the same number of ops and digest: they
would come with every receipt of every token. The receipt of the program that a reply answers is
always complete; those of the quiet programs before it (`BriefReceipt`) leave out what repeats.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Container, Iterable

from genie.errors import ProtocolError
from genie.wire.messages import BriefReceipt, ProgramReceipt


class Abridger:
    """The server's side: knows which templates' work was told to the client."""

    def __init__(self) -> None:
        self._kept: list[tuple[int, Callable[[], ProgramReceipt]]] = []
        self._told: dict[int, tuple[int, bytes]] = {}

    def keep(self, template: int, receipt: Callable[[], ProgramReceipt]) -> None:
        """``receipt`` is called when it is told: the program may still run."""
        self._kept.append((template, receipt))

    def drop(self) -> None:
        """Forgets the receipts kept: their programs' request failed."""
        self._kept = []

    def forget(self, templates: Iterable[int]) -> None:
        """They were evicted: the client need not remember them any longer."""
        for template in templates:
            self._told.pop(template, None)

    def take(self, live: Container[int], nonce: str = "") -> list[BriefReceipt]:
        """The receipts kept, for a reply that is about to leave; ``nonce`` is that of the reply's own
        receipt, ``live`` the templates that are not evicted."""
        kept, self._kept = self._kept, []
        brief = []
        for template, late in kept:
            receipt = late()
            work: tuple[int, bytes] | None = (receipt.ops, receipt.digest)
            if self._told.get(template) == work or template < 0:
                work = None
            elif template in live:
                self._told[template] = (receipt.ops, receipt.digest)
            same = receipt.nonce == nonce
            nonce = receipt.nonce
            brief.append(
                BriefReceipt(
                    template,
                    round(receipt.remote_ms * 1e6),
                    round(receipt.cpu_s * 1e9),
                    receipt.counters,
                    None if same else nonce,
                    work,
                )
            )
        return brief


class Completer:
    """The client's side: makes brief receipts whole again."""

    def __init__(self, pid: int, device: str) -> None:
        self._pid, self._device = pid, device
        self._told: dict[int, tuple[int, bytes]] = {-1: (0, b"")}
        self._leaving: deque[tuple[int, int]] = deque()

    def complete(self, brief: Iterable[BriefReceipt], nonce: str = "") -> list[ProgramReceipt]:
        """``nonce`` as for `Abridger.take`. Raises ProtocolError for work that was never told."""
        receipts = []
        for b in brief:
            if b.work is not None:
                self._told[b.template] = b.work
            try:
                ops, digest = self._told[b.template]
            except KeyError:
                raise ProtocolError(
                    f"the server's receipt for template {b.template} lacks its digest, which was never told: "
                    "install the same version of Genie on both"
                ) from None
            nonce = nonce if b.nonce is None else b.nonce
            receipts.append(
                ProgramReceipt(
                    self._pid,
                    self._device,
                    nonce,
                    ops,
                    digest,
                    b.remote_ns * 1e-6,
                    b.cpu_ns * 1e-9,
                    b.counters,
                )
            )
        return receipts

    def evict(self, template: int, reply: int) -> None:
        """The template is evicted by a request before or with that of reply number ``reply``: replies
        before may still refer to it."""
        self._leaving.append((reply, template))

    def replied(self, reply: int) -> None:
        """Reply number ``reply`` was completed (or was an error)."""
        while self._leaving and self._leaving[0][0] <= reply:
            self._told.pop(self._leaving.popleft()[1], None)
