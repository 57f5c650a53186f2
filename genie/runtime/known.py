"""What an executor remembers of windows that it planned: what follows what, and where it runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from genie.frontend.program import Program
from genie.runtime.steps import Slices
from genie.runtime.window import Memory
from genie.scheduler.plan import Plan

MAX_KNOWN = 4096


@dataclass
class Known:
    """What follows a sequence of programs since the last read, and how the last of them runs."""

    server: int = 0  # all of it, where ``slices`` is None
    slices: Slices | None = None
    sizes: Sequence | None = None  # for which it was cut; None: for any
    plan: Plan | None = None  # where it begins to be followed
    #: nothing follows: the next program begins a window, though nothing was read
    ends: bool = False
    next: dict[tuple, list[Known]] = field(default_factory=dict)
    #: externals (by number) that have to move first; always the same: what leads here tells where all are
    unmet: list[int] | None = None

    def fits(self, program: Program) -> bool:
        # Sizes of a part are no sizes that the entries of a new instruction could be checked against.
        return self.slices is None or (self.sizes == sizes_of(program) and not program.fresh)


def sizes_of(program: Program) -> Sequence:
    """Equal for programs of one template if all their sizes are equal."""
    return program.entries if program.sizes is None else program.sizes


class KnownWindows:
    """A tree of programs: each path from the root is a window, or its beginning."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        self._root, self._count = Known(), 0
        self._cursor = self._root

    def begin(self) -> None:
        """The next program begins a window."""
        self._cursor = self._root

    def stray(self) -> None:
        """What comes before the next beginning is not known, nor is to be learned."""
        self._cursor = Known()

    def following(self, key: tuple) -> Sequence[Known]:
        """What ran like this where we are."""
        return self._cursor.next.get(key, ())

    def follow(self, known: Known) -> None:
        self._cursor = self._root if known.ends else known

    def learn(self, key: tuple, known: Known) -> None:
        if self._count >= MAX_KNOWN:
            self.forget()
        self._cursor.next.setdefault(key, []).insert(0, known)
        self._count += 1
        self.follow(known)


@dataclass(frozen=True)
class Effects:
    """What a template does to the places of its values: slots kept, views kept with what they are views
    of, externals written to, externals that may do so only where their memory is."""

    kept: tuple[int, ...]
    views: tuple[tuple[int, int], ...]
    written: tuple[int, ...]
    held: tuple[int, ...]

    @classmethod
    def of(cls, program: Program, memory: Memory | None = None) -> Effects:
        """``memory``: of the program, where that is known already."""
        memory = memory or Memory.of(program)
        kept = tuple(h - program.base for h in program.kept_handles())
        views = tuple((s, memory.root[s]) for s in kept if s in memory.root)
        written = tuple(sorted(-root - 1 for root in memory.last_write if root < 0))
        viewed = {-root - 1 for _, root in views if root < 0}
        return cls(kept, views, written, tuple(sorted({*written, *viewed})))
