"""From a plan to what each server is sent: the parts of one program, and what moves between them.

A program of a window whose instructions all run on one server is left as it is. Any other is cut into
*runs*, each the instructions of one server between two moves. A value keeps its handle on every server,
so a run binds what it keeps to the names that the values have in the whole program. A value moves when its
memory is written to for the last time in the program: who reads it before that is where it is written.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from genie.errors import PlanError
from genie.frontend.program import Program
from genie.runtime.layout import order_of
from genie.runtime.steps import Gather, Move, Narrow, Need, Run, Slices, Step
from genie.runtime.window import Instruction, Memory, instructions
from genie.scheduler.batch_axis import part_spec
from genie.scheduler.plan import BatchSplit
from genie.scheduler.where import Axis, Shard, Where
from genie.wire.messages import TensorSpec


@dataclass
class _Segment:
    server: int
    numbers: list[int] = field(default_factory=list)
    before: list[Step] = field(default_factory=list)
    after: list[Move] = field(default_factory=list)


class Slicer:
    """Cuts one program. ``servers``: of each instruction. ``value``: the number in the window's graph of a
    slot (externals negative); ``axes`` of the split are by those. ``specs``: of the values by slot.
    ``first``: the number in the window of the program's first instruction."""

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
        axes = {} if split is None else split.batch.axes
        self._axes: dict[int, Axis] = {slot: axes[v] for slot, v in value.items() if v in axes}
        self._scaled = {} if split is None else split.batch.literals
        self._first = first
        self._code: tuple[Instruction, ...] = instructions(program.key[0])
        self._memory = Memory.of(program)
        self._maker = self._memory.made
        self._readers: dict[int, list[int]] = {}  # of what the program makes
        for number, i in enumerate(self._code):
            for slot in i.slots:
                if slot >= 0:
                    self._readers.setdefault(slot, []).append(number)
        self._all = () if split is None else tuple(sorted(s.server for s in split.shards))
        #: which instructions all of several servers run
        self._together = [len(self._all) > 1 and s == self._all for s in servers]
        self._shards: dict[int, Shard] = {} if split is None else {s.server: s for s in split.shards}
        self._external: dict[int, tuple[int, ...]] = {}  # servers that have one whole from the start
        #: (slot, server, by rows) -> number of the temporary value, and the instruction it is made before
        self._temporaries: dict[tuple[int, int, bool], tuple[int, int]] = {}
        self._moved: dict[tuple[int, int], int] = {}  # (slot, target) -> before
        kept = array("i")
        kept.frombytes(program.key[1])
        self._kept_slots = kept.tolist()

    def slices(self) -> Slices:
        """Raises PlanError for what cannot be carried out."""
        needs = self._needs()
        self._find_moves()
        self._cut()
        # What a segment waits for was made by the last instruction of another, which is earlier.
        segments = sorted(self._segments, key=lambda s: (s.numbers[-1], s.server))
        steps: list[Step] = list(self._at_start)
        for segment in segments:
            steps += segment.before
            steps.append(self._run(segment))
            steps += segment.after
        return Slices(steps, needs, self._kept(), self._release(steps), self._homes())

    # -- where values are --------------------------------------------------------------------------

    def _made(self, slot: int) -> tuple[int, ...]:
        return self._servers[self._maker[slot]] if slot >= 0 else self._external[slot]

    def _is_sharded(self, slot: int) -> bool:
        """Whether each server has its rows of it as it is made."""
        return slot in self._axes and len(self._all) > 1 and self._made(slot) == self._all

    def _takes_rows(self, slot: int, number: int) -> bool:
        """Whether instruction ``number`` works on the server's rows of the value."""
        return self._together[number] and slot in self._axes

    def _needs(self) -> list[Need]:
        whole: dict[int, set[int]] = {}
        by_rows: set[int] = set()
        for number, i in enumerate(self._code):
            for slot in i.slots:
                if slot >= 0:
                    continue
                if self._takes_rows(slot, number):
                    by_rows.add(slot)
                else:
                    last = self._memory.last_write.get(slot, number)
                    # What was written moves from where it was written.
                    servers = self._servers[min(number, last)]
                    if slot in whole:
                        whole[slot].update(servers)
                    else:
                        whole[slot] = set(servers)
        needs = []
        for k in range(self._program.n_ext):
            slot = -k - 1
            axis = self._axes.get(slot)
            written = self._memory.last_write.get(slot)
            rewritten = written is not None and self._servers[written] == self._all
            if slot in by_rows and (slot not in whole or rewritten):
                assert axis is not None and self._split is not None
                self._external[slot] = self._all
                needs.append(Need(sharded=Where(axis=axis, shards=self._split.shards)))
                continue
            servers = tuple(sorted(whole.get(slot, ())))
            if axis is not None and servers == self._all:
                servers = servers[:1]  # so that it is not taken for a sharded one
            self._external[slot] = servers
            needs.append(Need(servers))
        return needs

    # -- what moves --------------------------------------------------------------------------------

    def _find_moves(self) -> None:
        for number, (i, servers) in enumerate(zip(self._code, self._servers, strict=True)):
            for slot in i.slots:
                made = self._made(slot)
                if made == servers:  # by rows or whole, as it is read
                    continue
                rows = self._takes_rows(slot, number)
                for server in servers:
                    if self._is_sharded(slot) != rows:
                        key = (slot, server, rows)
                        if key not in self._temporaries:
                            self._temporaries[key] = (len(self._temporaries), number)
                            self._check(slot, number)
                    elif not rows and server not in made and (slot, server) not in self._moved:
                        self._moved[slot, server] = number
                        self._check(slot, number)

    def _check(self, slot: int, number: int) -> None:
        if self._memory.ready(slot) >= number:
            raise PlanError(
                f"the plan moves a value to instruction {self._first + number}, but instruction "
                f"{self._first + self._memory.ready(slot)} writes to it later: place both alike"
            )
        if self._split is not None and self._value[slot] in self._split.batch.local:
            raise PlanError(
                f"the plan moves a value to instruction {self._first + number} that means something only to "
                "the part of the batch that made it: place what reads it on all servers of the split"
            )

    def _cut(self) -> None:
        """Segments by server, cut where something must leave or arrive, with the moves."""
        arriving: dict[int, set[int]] = {}
        leaving: set[tuple[int, int]] = set()
        for (slot, target), before in self._moved.items():
            arriving.setdefault(before, set()).add(target)
            leaving.add((self._memory.ready(slot), self._made(slot)[0]))
        for (slot, target, _), (_, before) in self._temporaries.items():
            arriving.setdefault(before, set()).add(target)
            sources = self._made(slot) if self._is_sharded(slot) else self._made(slot)[:1]
            leaving.update((self._memory.ready(slot), s) for s in sources)
        open_: dict[int, _Segment] = {}
        done: list[_Segment] = []
        self._of: dict[tuple[int, int], _Segment] = {}
        for number, placed in enumerate(self._servers):
            for s in placed:
                if s in arriving.get(number, ()) and s in open_:
                    done.append(open_.pop(s))
                segment = open_.get(s)
                if segment is None:
                    segment = open_[s] = _Segment(s)
                segment.numbers.append(number)
                self._of[number, s] = segment
                if (number, s) in leaving:
                    done.append(open_.pop(s))
        self._segments = done + list(open_.values())
        self._at_start: list[Move] = []
        self._sent: set[tuple[int, int]] = set()  # (slot, server): needed there under its own handle
        for slot, target in self._moved:
            self._leave(Move(slot, self._made(slot)[0], target, self._spec(slot)))
        for (slot, target, rows), (number, before) in self._temporaries.items():
            segment = self._of[before, target]
            if rows:
                self._scatter(slot, target, number, segment)
            else:
                self._gather(slot, target, number, segment)

    def _leave(self, move: Move) -> None:
        after = self._memory.ready(move.slot)
        moves = self._at_start if after < 0 else self._of[after, move.source].after
        moves.append(move)
        self._sent.add((move.slot, move.source))

    def _scatter(self, slot: int, target: int, number: int, segment: _Segment) -> None:
        """A whole value's rows that ``target`` works on."""
        axis, shard = self._axes.get(slot), self._shards[target]
        assert axis is not None and self._split is not None
        start, length = shard.start * axis.inner, shard.rows * axis.inner
        made = self._made(slot)
        if target in made:
            segment.before.append(Narrow(number, target, slot, axis.dim, start, start + length))
            self._sent.add((slot, target))
            return
        spec = part_spec(self._spec(slot), axis, shard.rows, self._split.batch.size)
        self._leave(Move(slot, made[0], target, spec, number, 0, (axis.dim, start, length)))

    def _gather(self, slot: int, target: int, number: int, segment: _Segment) -> None:
        """All rows of a sharded value."""
        axis, split = self._axes.get(slot), self._split
        assert axis is not None and split is not None
        own = None
        for part, shard in enumerate(split.shards):
            if shard.server == target:
                own = part
                self._sent.add((slot, target))
                continue
            spec = part_spec(self._spec(slot), axis, shard.rows, split.batch.size)
            self._leave(Move(slot, shard.server, target, spec, number, part))
        segment.before.append(
            Gather(number, target, slot, axis.dim, len(split.shards), own, order_of(self._spec(slot)))
        )

    def _spec(self, slot: int) -> TensorSpec:
        spec = self._specs.get(slot)
        if spec is None:
            number = self._first + self._maker[slot] if slot >= 0 else slot
            raise PlanError(
                f"the plan moves a value of instruction {number} whose shape only its server knows: "
                "place what reads it on the same server"
            )
        return spec

    # -- runs -------------------------------------------------------------------------------------

    def _run(self, segment: _Segment) -> Run:
        code, program, s = self._code, self._program, segment.server
        rows = self._shards[s].rows if len(self._all) > 1 and s in self._shards else None
        out, names, kept = array("i"), array("i"), array("i")
        moved = self._temporaries
        local: dict[int, int] = {}
        ext: dict[tuple[bool, int], int] = {}  # (temporary, its number or the slot) -> place
        literals: list[int] = []
        floats: list[int] = []
        scaled: dict[int, int] = {}
        outliving = self._outliving(segment)
        n_slots = 0
        for number in segment.numbers:
            i, together = code[number], self._together[number]
            out.append(i.tid)
            for slot in i.slots:
                temporary = moved.get((slot, s, together and slot in self._axes)) if moved else None
                if temporary is not None:
                    out.append(-ext.setdefault((True, temporary[0]), len(ext)) - 1)
                elif slot in local:
                    out.append(local[slot])
                else:
                    out.append(-ext.setdefault((False, slot), len(ext)) - 1)
            if rows is not None and together:
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
            ext=[0 if temporary else ~x for temporary, x in ext],
            temporaries={place: x for place, (temporary, x) in enumerate(ext) if temporary},
            literals=literals,
            scaled=scaled,
            floats=floats,
            numbers=segment.numbers,
            layouts=[(local[slot], dims) for slot, dims in program.layouts if slot in local],
            replay=program.replay,
            loose=frozenset(
                place
                for place, number in enumerate(segment.numbers)
                if program.entries[number].views and self._memory.root_of_view(code[number]) not in local
            ),
        )

    def _outliving(self, segment: _Segment) -> set[int]:
        """The segment's values that something outside of it on this server needs, or that are kept."""
        s, inside = segment.server, set(segment.numbers)
        keep = {*self._kept_slots, *(slot for slot, source in self._sent if source == s)}
        keep = {slot for slot in keep if slot >= 0 and self._maker[slot] in inside}
        for number in segment.numbers:
            i = self._code[number]
            for slot in range(i.first_new, i.first_new + i.reads.new):
                if not inside.issuperset(self._readers.get(slot, ())):
                    keep.add(slot)
        return keep

    # -- afterwards -------------------------------------------------------------------------------

    def _release(self, steps: list[Step]) -> dict[int, list[int]]:
        """What the program does not keep dies on each server after the last step there that uses it. Returns
        what no run can free, because it is sent away after the last one."""
        leftover: dict[int, list[int]] = {}
        keep = set(self._kept_slots)
        last: dict[tuple[int, int], int] = {}  # (server, slot) -> step
        last_temporary: dict[int, Run] = {}
        for k, step in enumerate(steps):
            if isinstance(step, Run):
                for place, source in enumerate(step.ext):
                    if place in step.temporaries:
                        last_temporary[step.temporaries[place]] = step
                    elif source < 0:
                        last[step.server, ~source] = k
                names = array("i")
                names.frombytes(step.names)
                for slot in names:
                    last.setdefault((step.server, slot), k)
            elif isinstance(step, Move):
                if step.slot >= 0:
                    last[step.source, step.slot] = k
                    if step.temporary is None:
                        last.setdefault((step.target, step.slot), k)
                elif step.temporary is None:
                    leftover.setdefault(step.target, []).append(step.slot)
            elif step.slot >= 0 and not (isinstance(step, Gather) and step.own is None):
                last[step.server, step.slot] = k
        for number, run in last_temporary.items():
            run.done.append(number)
        runs = {k: step for k, step in enumerate(steps) if isinstance(step, Run)}
        for (server, slot), at in last.items():
            if slot in keep and server in self._made(slot):
                continue
            after = [k for k, run in runs.items() if run.server == server and k >= at]
            if after:
                runs[after[0]].release.append(slot)
            else:
                leftover.setdefault(server, []).append(slot)
        return leftover

    def _kept(self) -> list[tuple[int, Where]]:
        return [(slot, self._whereabouts(slot, self._made(slot))) for slot in self._kept_slots]

    def _whereabouts(self, slot: int, servers: tuple[int, ...]) -> Where:
        if not self._is_sharded(slot):
            return Where(servers=servers)
        assert self._split is not None
        return Where(axis=self._axes[slot], shards=self._split.shards)

    def _homes(self) -> list[tuple[int, tuple[int, ...]]]:
        homes: dict[int, tuple[int, ...]] = {}
        for slot in self._kept_slots:
            root = self._memory.root.get(slot, slot)
            if root < 0:
                homes.setdefault(-root - 1, self._made(slot))
        for root, last in self._memory.last_write.items():
            if root < 0:
                homes[-root - 1] = self._servers[last]
        return sorted(homes.items())
