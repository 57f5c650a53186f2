"""From a plan to what each server is sent: the parts of one program, and what moves between them.

A program of a window whose instructions all run on one server is left as it is. Any other is cut into
*runs*, each the instructions of one server between two moves. A value keeps its handle on every server,
so a run binds what it keeps to the names that the values have in the whole program.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from genie.errors import PlanError
from genie.frontend.program import Program
from genie.runtime.window import Instruction, instructions
from genie.scheduler.batch_axis import part_spec
from genie.scheduler.plan import BatchSplit
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
    """A value that the program made goes from ``source`` to ``target``. With ``gather`` it is the source's
    rows of a sharded value, and becomes part number ``part`` of the temporary ``gather`` on the target."""

    slot: int
    source: int
    target: int
    spec: TensorSpec
    gather: int | None = None
    part: int = 0


@dataclass(frozen=True)
class Gather:
    """On ``server`` the ``parts`` of a sharded value become the temporary ``number``; the server's own part
    (``own``, a place among them, or None) is bound to the value's handle."""

    number: int
    server: int
    slot: int
    dim: int
    parts: int
    own: int | None


@dataclass
class Run:
    """Instructions of a program on one server, as a template of their own.

    ``ext``: for each external of the run, where its handle comes from: k >= 0 the program's k-th external,
    else ~slot of the program; those in ``temporaries`` (by place) are gathered values. ``literals``: places
    in the program's vector; ``scaled``: literals that the part of a batch changes. ``release``: the program's
    slots that die on this server after the run.
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
    release: list[int] = field(default_factory=list)

    def bind(self, program: Program, temporaries: Mapping[int, int], checked: bool) -> Program:
        """The run for one call. ``temporaries``: the handles of gathered values. ``checked``: what is
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
            fresh = [place for place, i in enumerate(self.numbers) if i in new]
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


Step = Run | Move | Gather


@dataclass
class Slices:
    """How one program runs by parts. ``kept``: where each of the program's kept slots is afterwards.
    ``leftover``: by server, slots to free there after all steps."""

    steps: list[Step]
    needs: list[Need]
    kept: list[tuple[int, Where]]
    leftover: dict[int, list[int]]


@dataclass
class _Segment:
    server: int
    numbers: list[int] = field(default_factory=list)
    gathers: dict[int, int] = field(default_factory=dict)  # slot -> temporary


class Slicer:
    """Cuts one program. ``servers``: of each instruction. ``value``: the number in the window's graph of a
    slot (externals negative); ``axes`` of the split are by those. ``specs``: of the values by slot."""

    def __init__(
        self,
        program: Program,
        servers: Sequence[tuple[int, ...]],
        split: BatchSplit | None,
        value: Mapping[int, int],
        specs: Mapping[int, TensorSpec | None],
        first: int,
    ) -> None:
        self._program, self._servers, self._split = program, servers, split
        self._value, self._specs = value, specs
        self._scaled = {} if split is None else split.batch.literals
        self._first = first  # number of the program's first instruction in the window
        self._code: tuple[Instruction, ...] = instructions(program.key[0])
        self._maker: dict[int, int] = {}
        for number, i in enumerate(self._code):
            for k in range(i.reads.new):
                self._maker[i.first_new + k] = number
        #: by server: slots that no run there can free, because they are sent away after the last one
        self.leftover: dict[int, list[int]] = {}
        self._all = () if split is None else tuple(sorted(s.server for s in split.shards))

    def slices(self) -> Slices:
        """Raises PlanError for what cannot be carried out."""
        self._cuts()
        steps: list[Step] = []
        for segment in self._ordered():
            for slot, number in segment.gathers.items():
                steps.append(self._gather(slot, number, segment.server))
            steps.append(self._run(segment))
            steps += self._moves.get(id(segment), [])
        self._release(steps)
        return Slices(steps, self._needs(), self._kept(), self.leftover)

    # -- where values are --------------------------------------------------------------------------

    def _is_sharded(self, slot: int) -> bool:
        """Whether each server has its rows of it: the batch is in it, and all parts make (or read) it."""
        if self._split is None or self._value[slot] not in self._split.batch.axes:
            return False
        return slot < 0 or self._servers[self._maker[slot]] == self._all

    def _cuts(self) -> None:
        """Segments by server, cut where something must leave or arrive, and the moves after each."""
        code, servers = self._code, self._servers
        incoming: dict[int, set[int]] = {}  # instruction -> servers where something must arrive first
        leaving: set[tuple[int, int]] = set()  # (maker, server): something leaves after it
        wanted: list[tuple[int, int, int, int]] = []  # slot, source, target, before
        gathered: dict[tuple[int, int], tuple[int, int]] = {}  # (slot, target) -> (temporary, before)
        moved: set[tuple[int, int]] = set()
        for number, i in enumerate(code):
            for slot in dict.fromkeys(i.slots):
                if slot < 0:
                    continue
                maker = self._maker[slot]
                made = servers[maker]
                for target in servers[number]:
                    if self._is_sharded(slot):
                        if servers[number] == self._all:
                            continue
                        if (slot, target) not in gathered:
                            gathered[slot, target] = (len(gathered), number)
                            incoming.setdefault(number, set()).add(target)
                            leaving.update((maker, s) for s in made)
                    elif target not in made and (slot, target) not in moved:
                        moved.add((slot, target))
                        wanted.append((slot, made[0], target, number))
                        incoming.setdefault(number, set()).add(target)
                        leaving.add((maker, made[0]))
        open_: dict[int, _Segment] = {}
        done: list[_Segment] = []
        of: dict[tuple[int, int], _Segment] = {}
        for number, placed in enumerate(servers):
            for s in placed:
                if s in incoming.get(number, ()) and s in open_:
                    done.append(open_.pop(s))
                segment = open_.get(s)
                if segment is None:
                    segment = open_[s] = _Segment(s)
                segment.numbers.append(number)
                of[number, s] = segment
                if (number, s) in leaving:
                    done.append(open_.pop(s))
        done += open_.values()
        self._segments = done
        self._moves: dict[int, list[Move]] = {}
        for slot, source, target, _before in wanted:
            segment = of[self._maker[slot], source]
            self._moves.setdefault(id(segment), []).append(Move(slot, source, target, self._spec(slot)))
        self._temporaries = gathered
        for (slot, target), (temporary, before) in gathered.items():
            of[before, target].gathers[slot] = temporary
            assert self._split is not None
            axis = self._split.batch.axes[self._value[slot]]
            for part, shard in enumerate(self._split.shards):
                if shard.server != target:
                    spec = part_spec(self._spec(slot), axis, shard.rows, self._split.batch.size)
                    segment = of[self._maker[slot], shard.server]
                    self._moves.setdefault(id(segment), []).append(
                        Move(slot, shard.server, target, spec, temporary, part)
                    )
        self._sent = {(move.slot, move.source) for moves in self._moves.values() for move in moves}
        # A gathered value's own part is needed where it is gathered.
        self._sent |= {(slot, target) for slot, target in gathered}

    def _spec(self, slot: int) -> TensorSpec:
        spec = self._specs.get(slot)
        if spec is None:
            number = self._first + self._maker[slot] if slot >= 0 else slot
            raise PlanError(
                f"the plan moves a value of instruction {number} whose shape only its server knows: "
                "place what reads it on the same server"
            )
        return spec

    def _ordered(self) -> list[_Segment]:
        # What a segment waits for was made by the last instruction of another, which is earlier.
        return sorted(self._segments, key=lambda s: (s.numbers[-1], s.server))

    # -- steps ------------------------------------------------------------------------------------

    def _gather(self, slot: int, number: int, server: int) -> Gather:
        assert self._split is not None
        shards = self._split.shards
        own = next((k for k, s in enumerate(shards) if s.server == server), None)
        return Gather(number, server, slot, self._split.batch.axes[self._value[slot]].dim, len(shards), own)

    def _run(self, segment: _Segment) -> Run:
        code, program, s = self._code, self._program, segment.server
        inside = set(segment.numbers)
        rows = None
        if self._split is not None and s in self._all:
            rows = next(shard.rows for shard in self._split.shards if shard.server == s)
        out, names, kept = array("i"), array("i"), array("i")
        local: dict[int, int] = {}
        ext: dict[tuple[str, int], int] = {}
        literals: list[int] = []
        floats: list[int] = []
        scaled: dict[int, int] = {}
        outliving = self._outliving(segment, inside)
        n_slots = 0
        for number in segment.numbers:
            i = code[number]
            out.append(i.tid)
            for slot in i.slots:
                if slot in local:
                    out.append(local[slot])
                    continue
                key = ("x", slot)
                if slot >= 0 and self._is_sharded(slot) and self._servers[number] != self._all:
                    key = ("t", self._temporaries[slot, s][0])
                out.append(-ext.setdefault(key, len(ext)) - 1)
            if rows is not None and self._servers[number] == self._all:
                for position, inner in self._scaled.get(self._first + number, ()):
                    scaled[len(literals) + position] = rows * inner
            literals += range(i.first_literal, i.first_literal + i.reads.literals)
            floats += range(i.first_float, i.first_float + i.reads.floats)
            for k in range(i.reads.new):
                slot = i.first_new + k
                local[slot] = n_slots
                if slot in outliving:
                    kept.append(n_slots)
                    names.append(slot)
                n_slots += 1
        return Run(
            server=s,
            key=(out.tobytes(), kept.tobytes()),
            names=names.tobytes(),
            n_slots=n_slots,
            # Slot -(k+1) stands for the k-th external: ~slot either way.
            ext=[~x if kind == "x" else 0 for kind, x in ext],
            temporaries={place: x for place, (kind, x) in enumerate(ext) if kind == "t"},
            literals=literals,
            scaled=scaled,
            floats=floats,
            numbers=segment.numbers,
            layouts=[(local[slot], dims) for slot, dims in program.layouts if slot in local],
            replay=program.replay,
        )

    def _outliving(self, segment: _Segment, inside: set[int]) -> set[int]:
        """The segment's values that something outside of it on this server needs, or that are kept."""
        s = segment.server
        keep = {*self._kept_slots(), *(slot for slot, source in self._sent if source == s)}
        keep = {slot for slot in keep if slot >= 0 and self._maker[slot] in inside}
        for number, i in enumerate(self._code):
            if number in inside and s in self._servers[number]:
                continue
            for slot in i.slots:
                if slot >= 0 and self._maker[slot] in inside:
                    keep.add(slot)
        return keep

    def _kept_slots(self) -> list[int]:
        slots = array("i")
        slots.frombytes(self._program.key[1])
        return slots.tolist()

    def _release(self, steps: list[Step]) -> None:
        """What the program does not keep dies on each server after the last step there that uses it."""
        keep = set(self._kept_slots())
        last: dict[tuple[int, int], int] = {}  # (server, slot) -> step
        runs = {k: step for k, step in enumerate(steps) if isinstance(step, Run)}
        for k, step in enumerate(steps):
            if isinstance(step, Run):
                for place, source in enumerate(step.ext):
                    if source < 0 and place not in step.temporaries:
                        last[step.server, ~source] = k
                names = array("i")
                names.frombytes(step.names)
                for slot in names:
                    last.setdefault((step.server, slot), k)
            elif isinstance(step, Move):
                last[step.source, step.slot] = k
                if step.gather is None:
                    last.setdefault((step.target, step.slot), k)
            else:
                if step.own is not None:
                    last[step.server, step.slot] = k
        for (server, slot), at in last.items():
            if slot in keep and server in self._servers[self._maker[slot]]:
                continue
            after = [k for k, run in runs.items() if run.server == server and k >= at]
            if after:
                runs[after[0]].release.append(slot)
            else:
                self.leftover.setdefault(server, []).append(slot)

    # -- externals and results --------------------------------------------------------------------

    def _needs(self) -> list[Need]:
        whole: list[set[int]] = [set() for _ in self._program.ext]
        sharded: list[bool] = [False] * len(whole)
        for number, i in enumerate(self._code):
            for slot in i.slots:
                if slot >= 0:
                    continue
                if self._is_sharded(slot) and self._servers[number] == self._all:
                    sharded[-slot - 1] = True
                else:
                    whole[-slot - 1].update(self._servers[number])
        needs = []
        for k, (servers, by_rows) in enumerate(zip(whole, sharded, strict=True)):
            if by_rows and servers:
                raise PlanError(f"external {k} is needed whole and by rows of the batch: do not split it")
            if by_rows:
                assert self._split is not None
                axis = self._split.batch.axes[self._value[-k - 1]]
                needs.append(Need(sharded=Where(axis=axis, shards=self._split.shards)))
            else:
                needs.append(Need(tuple(sorted(servers))))
        return needs

    def _kept(self) -> list[tuple[int, Where]]:
        kept = []
        for slot in self._kept_slots():
            if self._is_sharded(slot):
                assert self._split is not None
                axis = self._split.batch.axes[self._value[slot]]
                kept.append((slot, Where(axis=axis, shards=self._split.shards)))
            else:
                kept.append((slot, Where(servers=self._servers[self._maker[slot]])))
        return kept
