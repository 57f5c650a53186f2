"""What the servers of a pool are told to do for one program: runs, and what moves between them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from genie.frontend.program import Program
from genie.scheduler.where import Where
from genie.wire.messages import TensorSpec


@dataclass(frozen=True)
class Need:
    """Where an external of a program must be before the program runs: whole on ``servers``, or, with
    ``sharded``, just there by rows."""

    servers: tuple[int, ...] = ()
    sharded: Where | None = None


@dataclass(frozen=True)
class Move:
    """A value goes from ``source`` to ``target``, as it is when the steps before are done. ``slot``: >= 0 one
    that the program made, -(k+1) its k-th external. On the target it has the handle that it has on the
    source; with ``temporary`` it becomes part ``part`` of that temporary value. ``narrow``: (dimension,
    start, length) of what is moved; ``spec`` is that of what is moved."""

    slot: int
    source: int
    target: int
    spec: TensorSpec
    temporary: int | None = None
    part: int = 0
    narrow: tuple[int, int, int] | None = None


@dataclass(frozen=True)
class Gather:
    """On ``server`` the ``parts`` of a sharded value become the temporary ``number``; the server's own part
    (``own``, a place among them, or None) is bound to the value's handle. ``order``: its dimensions as they
    lie in memory, the outermost first."""

    number: int
    server: int
    slot: int
    dim: int
    parts: int
    own: int | None
    order: tuple[int, ...]


@dataclass(frozen=True)
class Narrow:
    """On ``server``, elements ``start`` to ``stop`` of dimension ``dim`` of a whole value become the
    temporary ``number`` (a view)."""

    number: int
    server: int
    slot: int
    dim: int
    start: int
    stop: int


@dataclass
class Run:
    """Instructions of a program on one server, as a template of their own.

    ``ext``: for each external of the run, where its handle comes from: k >= 0 the program's k-th external,
    else ~slot of the program; those in ``temporaries`` (by place) are temporary values. ``literals``: places
    in the program's vector; ``scaled``: literals that the part of a batch changes. ``release``: the program's
    slots that die on this server after the run; ``done``: temporary values that do. ``loose``: places among
    ``numbers`` of views of what comes from outside the run: it may have been moved, and then it is dense, so
    the strides of such views are not what they would be on one server.
    """

    server: int
    key: tuple[bytes, bytes]
    names: bytes
    n_slots: int
    ext: list[int]
    temporaries: dict[int, int]
    literals: list[int]
    scaled: dict[int, int]
    floats: list[int]
    numbers: list[int]
    layouts: list[tuple[int, list[int]]]
    replay: bool
    loose: frozenset[int] = frozenset()
    release: list[int] = field(default_factory=list)
    done: list[int] = field(default_factory=list)

    def bind(self, program: Program, temporaries: Mapping[int, int], checked: bool) -> Program:
        """The run for one call. ``temporaries``: the handles of temporary values. ``checked``: what is
        fresh in the program is checked in the run (its sizes are those of the whole)."""
        base, ext = program.base, program.ext
        handles = [ext[k] if k >= 0 else base + ~k for k in self.ext]
        for place, number in self.temporaries.items():
            handles[place] = temporaries[number]
        literals = [program.literals[i] for i in self.literals]
        for place, value in self.scaled.items():
            literals[place] = value
        entries = [program.entries[i] for i in self.numbers]
        fresh: list[int] = []
        if checked and program.fresh:
            new = set(program.fresh)
            fresh = [k for k, i in enumerate(self.numbers) if i in new and k not in self.loose]
        return Program(
            key=self.key,
            n_ext=len(handles),
            n_slots=self.n_slots,
            literals=literals,
            floats=[program.floats[i] for i in self.floats],
            ext=handles,
            base=base,
            inputs=[],
            release=[base + slot for slot in self.release],
            entries=entries,
            fresh=fresh,
            layouts=self.layouts,
            replay=self.replay,
            names=self.names,
        )


Step = Run | Move | Gather | Narrow


@dataclass
class Slices:
    """How one program runs by parts. ``kept``: where each of the program's kept slots is afterwards.
    ``leftover``: by server, slots (of externals: negative) to free there after all steps. ``homes``: for each
    external that is written to, or of which a view is kept, the servers where that happens."""

    steps: list[Step]
    needs: list[Need]
    kept: list[tuple[int, Where]]
    leftover: dict[int, list[int]]
    homes: list[tuple[int, tuple[int, ...]]]
