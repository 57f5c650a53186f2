"""Processes that are measured side by side take turns: one works, the others stand still.

A shared machine changes its speed within seconds (neighbours, clocks), by far more than what a gate looks
for. Two processes measured one after the other see two machines; two that take turns at every round see
one. So old and new are alive together, and a turn is one step of a cell: loading, the cold request, a
warm-up, one timed round, the verification. Rounds run in the order ABBA ABBA ...

`Turns` is the side of the gate, which grants turns over a Unix socket. This module is also the pytest
plugin of a measuring process (``-p genie.bench.gate.turns``): it asks for a turn wherever the measurement
tells its progress, which is never inside a timed request. Before the first cell (imports) and after the
last, processes run freely; a process that fails or ends is not waited for.
"""

from __future__ import annotations

import json
import os
import selectors
import shutil
import socket
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pytest

VARIABLE = "GENIE_GATE_TURNS"
#: how often it is looked whether a process has ended without a word, in seconds
_LOOK_S = 0.5

#: (cell by first appearance, step, number): where a process is in its run
Place = tuple[int, int, int]


@dataclass
class _Player:
    """One process. ``place`` is where it waits, None while it works."""

    rank: int
    connection: socket.socket
    place: Place | None = None
    received: bytes = b""


class Turns:
    """Grants turns to ``count`` processes, ranked by their labels' order. A context manager."""

    def __init__(self, count: int, mirrored: bool = False) -> None:
        self._count = count
        self._mirrored = mirrored
        self._players: list[_Player] = []
        self._cells: dict[str, int] = {}
        self._folder = tempfile.mkdtemp(prefix="genie-turns-")
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(f"{self._folder}/socket")
        self._listener.listen(count)

    def address(self, rank: int) -> str:
        """For the environment of the process with this rank."""
        return f"{rank}:{self._folder}/socket"

    def serve(self, running: Callable[[], int]) -> None:
        """Until no process runs any more; ``running`` counts those that do."""
        with selectors.DefaultSelector() as selector:
            selector.register(self._listener, selectors.EVENT_READ)
            looked = time.monotonic()
            alive = running()
            while alive:
                for key, _ in selector.select(_LOOK_S):
                    if key.fileobj is self._listener:
                        connection, _ = self._listener.accept()
                        player = _Player(-1, connection)
                        self._players.append(player)
                        selector.register(connection, selectors.EVENT_READ, player)
                    elif not self._hear(key.data):
                        selector.unregister(key.data.connection)
                        key.data.connection.close()
                        self._players.remove(key.data)
                        alive = running()
                if time.monotonic() - looked > _LOOK_S:
                    looked, alive = time.monotonic(), running()
                self._grant(alive)

    def close(self) -> None:
        for player in self._players:
            player.connection.close()
        self._listener.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def __enter__(self) -> Turns:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _hear(self, player: _Player) -> bool:
        """Takes in what a process tells; False when it has gone."""
        try:
            told = player.connection.recv(4096)
        except ConnectionResetError:
            return False
        if not told:
            return False
        *lines, player.received = (player.received + told).split(b"\n")
        for line in lines:
            player.rank, cell, step, number = json.loads(line)
            player.place = (self._cells.setdefault(cell, len(self._cells)), step, number)
        return True

    def _grant(self, alive: int) -> None:
        """Lets the process that is furthest behind go on, once all that live wait."""
        waiting = [player for player in self._players if player.place is not None]
        if not waiting or len(waiting) < min(alive, self._count):
            return
        place = min(player.place for player in waiting if player.place is not None)
        backwards = (place[2] % 2 == 0) != self._mirrored
        behind = [player for player in waiting if player.place == place]
        chosen = (max if backwards else min)(behind, key=lambda player: player.rank)
        chosen.place = None
        try:
            chosen.connection.sendall(b"\n")
        except OSError:
            pass  # it has ended in the meantime; its connection tells so at the next look


class _Taker:
    """In a measuring process: waits for a turn before each step."""

    def __init__(self, address: str) -> None:
        rank, _, path = address.partition(":")
        self._rank = int(rank)
        self._cell = ""
        self._connection = socket.socket(socket.AF_UNIX)
        self._connection.connect(path)

    def take(self, step: int, number: int) -> None:
        """Raises ConnectionError when the gate has ended: nobody would ever grant this turn."""
        self._connection.sendall(json.dumps([self._rank, self._cell, step, number]).encode() + b"\n")
        if not self._connection.recv(1):
            raise ConnectionError("the gate that measures with this process has ended")

    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        self._cell = item.nodeid

    def pytest_unconfigure(self) -> None:
        self._connection.close()


def pytest_collection_finish(session: pytest.Session) -> None:
    """Makes the measurement's progress wait for its turns."""
    from genie.bench import progress as steps
    from genie.bench.session import session_of

    order = (steps.PREPARE, steps.COLD, steps.WARM_UP, steps.ROUND, steps.VERIFY)
    taker = _Taker(os.environ[VARIABLE])
    session.config.pluginmanager.register(taker, "genie-turns")
    progress: Any = session_of(session.config).progress
    tell = progress.phase

    def phase(name: str, number: int = 0, of: int = 0) -> None:
        tell(name, number, of)
        if name in order:  # fixtures are set up outside, where a process may be alone
            taker.take(order.index(name), number)

    progress.phase = phase
