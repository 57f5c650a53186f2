"""Where a value is: on which servers, whole or by rows of a batch, or still with the client."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Axis:
    """Where the batch lies in a value: dimension ``dim`` has ``rows * inner`` elements, rows outermost.

    ``inner`` is 1 but where a view has merged the batch with dimensions inside it.
    """

    dim: int
    inner: int = 1


@dataclass(frozen=True)
class Shard:
    """Rows ``start`` to ``stop`` (exclusive) of the batch are on server ``server``."""

    server: int
    start: int
    stop: int

    @property
    def rows(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Where:
    """Exactly one holds: on the client; whole copies on ``servers`` (ascending); or ``shards`` along ``axis``
    (each row on one server, in order of rows)."""

    servers: tuple[int, ...] = ()
    axis: Axis | None = None
    shards: tuple[Shard, ...] = ()

    @property
    def on_client(self) -> bool:
        return not self.servers and not self.shards


CLIENT = Where()
