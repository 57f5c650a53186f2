"""A window: the programs that a client recorded between two reads, as one program that can be planned."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import msgspec

from genie.frontend.entries import Entry, definition
from genie.frontend.program import Program
from genie.frontend.specs import Spec
from genie.scheduler.flow import written


@dataclass(frozen=True)
class Reads:
    """What one op definition takes: tensor arguments, ints and floats from the vectors; new tensors made.
    ``written``: positions among the tensor arguments of those that it writes to, if it writes."""

    tensors: int
    literals: int
    floats: int
    new: int
    written: tuple[int, ...]


@lru_cache(maxsize=65_536)
def reads_of(tid: int) -> Reads:
    d = definition(tid)
    tensors = literals = floats = 0
    for kind, *payload in (*d.args, *d.kwargs.values()):
        if kind == "t":
            tensors += 1
        elif kind == "tl":
            tensors += payload[0]
        elif kind == "ol":
            tensors += sum(payload[0])
        elif kind == "i":
            literals += 1
        elif kind == "il":
            literals += payload[0]
        elif kind == "f":
            floats += 1
        elif kind == "fl":
            floats += payload[0]
    places = tuple(range(tensors))
    named = tuple(sorted({o for o in d.outs if o >= 0}))
    changed = tuple(written(_Call(d.op, d.args, places, named)))  # type: ignore[arg-type]
    return Reads(tensors, literals, floats, d.outs.count(-1), changed or places)


@dataclass(frozen=True)
class _Call:
    """An op definition, as `genie.scheduler.flow.written` asks of a node."""

    op: str
    args: list
    inputs: tuple[int, ...]
    writes: tuple[int, ...]


@dataclass(frozen=True)
class Memory:
    """Who shares and writes memory in a program. ``root``: of a slot that is a view, what it is a view of;
    ``last_write``: of a slot that owns memory, the last instruction that writes to it (or to a view of it);
    only what is written has one. ``made``: the instruction that makes a slot; -1 for externals."""

    root: dict[int, int]
    last_write: dict[int, int]
    made: dict[int, int]

    @classmethod
    def of(cls, program: Program) -> Memory:
        root: dict[int, int] = {}
        last_write: dict[int, int] = {}
        made: dict[int, int] = {}
        pairs = zip(instructions(program.key[0]), program.entries, strict=True)
        for number, (i, entry) in enumerate(pairs):
            for slot in range(i.first_new, i.first_new + i.reads.new):
                made[slot] = number
                if entry.views:
                    root[slot] = root.get(i.slots[0], i.slots[0])
            if entry.writes:
                for place in i.reads.written:
                    slot = i.slots[place]
                    last_write[root.get(slot, slot)] = number
        return cls(root, last_write, made)

    def root_of_view(self, view: Instruction) -> int:
        """What a view is a view of."""
        return self.root.get(view.slots[0], view.slots[0])

    def ready(self, slot: int) -> int:
        """The instruction after which the value has its final content; -1 for an unwritten external."""
        return max(self.made.get(slot, -1), self.last_write.get(self.root.get(slot, slot), -1))


class Instruction(msgspec.Struct, frozen=True, gc=False):
    """One instruction of a template. ``slots`` of its tensor arguments: >= 0 made by the program, -(k+1)
    its k-th external. ``first_*``: where its own begin among the program's vectors and new values."""

    tid: int
    slots: tuple[int, ...]
    first_literal: int
    first_float: int
    first_new: int
    reads: Reads


@lru_cache(maxsize=512)
def instructions(code: bytes) -> tuple[Instruction, ...]:
    """The instructions of a template's code."""
    ints = array("i")
    ints.frombytes(code)
    found: list[Instruction] = []
    at = literal = float_at = new = 0
    while at < len(ints):
        tid = ints[at]
        reads = reads_of(tid)
        end = at + 1 + reads.tensors
        found.append(Instruction(tid, tuple(ints[at + 1 : end]), literal, float_at, new, reads))
        at, literal, float_at, new = end, literal + reads.literals, float_at + reads.floats, new + reads.new
    return tuple(found)


@dataclass
class Window:
    """``program`` runs ``programs`` one after another: its slots are handles less ``program.base``, its
    kept slots those that outlive the window. ``starts``: the first instruction of each. ``specs``: of its
    externals, None where only a server can tell. ``memory``: of ``program``."""

    programs: Sequence[Program]
    program: Program
    memory: Memory
    starts: tuple[int, ...]
    specs: list[Spec | None]


def merge(programs: Sequence[Program]) -> Window:
    """``programs`` in the order in which they were recorded; together they are one window."""
    base = programs[0].base
    code, ext, specs = array("i"), dict[int, int](), list[Spec | None]()
    entries: list[Entry] = []
    literals: list[int] = []
    floats: list[float] = []
    starts: list[int] = []
    kept: set[int] = set()
    memory = Memory({}, {}, {})
    root, last_write, made = memory.root, memory.last_write, memory.made
    for program in programs:
        own, ext_specs = (program.entries, None) if program.concrete is None else program.concrete()
        starts.append(len(entries))
        entries += own
        literals += program.literals
        floats += program.floats
        shift = program.base - base
        outer: list[int] = []  # the window's slot of each external of the program
        for h in program.ext:
            if h >= base:
                outer.append(h - base)
                continue
            k = ext.get(h)
            if k is None:
                k = ext[h] = len(ext)
                specs.append(None)
            outer.append(-k - 1)
        if ext_specs is not None:
            for slot, spec in zip(outer, ext_specs, strict=True):
                if slot < 0:
                    specs[-slot - 1] = spec
        numbers = enumerate(zip(instructions(program.key[0]), own, strict=True), starts[-1])
        for number, (instruction, entry) in numbers:
            slots = [slot + shift if slot >= 0 else outer[-slot - 1] for slot in instruction.slots]
            code.append(instruction.tid)
            code.extend(slots)
            for position, slot in enumerate(slots):
                if slot < 0 and specs[-slot - 1] is None and position < len(entry.ins):
                    specs[-slot - 1] = entry.ins[position]
            first = instruction.first_new + shift
            for slot in range(first, first + instruction.reads.new):
                made[slot] = number
                if entry.views:
                    root[slot] = root.get(slots[0], slots[0])
            if entry.writes:
                for place in instruction.reads.written:
                    slot = slots[place]
                    last_write[root.get(slot, slot)] = number
        kept.update(h - base for h in program.kept_handles())
        kept.difference_update(h - base for h in program.release)
    last = programs[-1]
    merged = Program(
        key=(code.tobytes(), array("i", sorted(kept)).tobytes()),
        n_ext=len(ext),
        n_slots=last.base + last.n_slots - base,
        literals=literals,
        floats=floats,
        ext=list(ext),
        base=base,
        inputs=[],
        release=[],
        entries=entries,
        fresh=[],
        first=programs[0].first,
        weight_names=programs[0].weight_names,
    )
    return Window(programs, merged, memory, tuple(starts), specs)
