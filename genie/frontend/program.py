"""A recorded program on its way to an executor, and the Protocol that executors follow."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

from genie.frontend.entries import Entry
from genie.frontend.names import WeightNames
from genie.frontend.specs import Spec
from genie.wire.messages import Check, OpDef, ProgramReceipt, Relayout, TemplateBody, TensorSpec

if TYPE_CHECKING:
    from genie.profiling.recording import ProgramTrace


@dataclass
class Program:
    """Instructions between two syncs, in program order.

    ``key`` identifies the template: equal keys mean equal code, kept slots and definitions.
    ``ext`` are the handles bound to the template's externals, in order. ``inputs`` are small host
    tensors that travel along. ``release`` are handles whose tensors died; they may still be used
    by this program and are freed after it.
    """

    key: tuple[bytes, bytes]
    n_ext: int
    n_slots: int
    literals: list[int]
    floats: list[float]
    ext: list[int]
    base: int
    inputs: list[tuple[int, Tensor]]
    release: list[int]
    entries: list[Entry]
    fresh: list[int]  # instructions whose entry is used for the first time
    first: int = 0  # number of the first instruction, counted through the session
    capture_s: float = 0.0
    layouts: list[tuple[int, list[int]]] = field(default_factory=list)  # see `TemplateBody`
    replay: bool = False
    started: float = 0.0  # `time.perf_counter` when the first op was recorded
    trace: ProgramTrace | None = None  # what a profile that is being taken follows it with
    names: bytes = b""  # see `TemplateBody`
    #: where ``entries`` hold the sizes of another call: the entries and the externals' specs of this one
    concrete: Callable[[], tuple[list[Entry], list[Spec]]] | None = None
    #: two programs of one key have equal sizes throughout if these are equal; None: if their entries are
    sizes: Sequence[int] | None = None
    weight_names: WeightNames | None = None  # of the session, as they are now

    @property
    def template(self) -> tuple[bytes, bytes]:
        """Identifies the template as servers know it: a part of a program binds names of its own."""
        return (self.key[0], self.key[1] + b"|" + self.names) if self.names else self.key

    def tids(self) -> list[int]:
        """The op definitions that the program uses, each once."""
        return list(dict.fromkeys(e.tid for e in self.entries))

    def body(self, defs: list[OpDef]) -> TemplateBody:
        return TemplateBody(
            defs, self.key[0], self.n_ext, self.n_slots, self.key[1], self.layouts, self.replay, self.names
        )

    def checks(self) -> list[Check]:
        return [Check(i, self.entries[i].wire_specs()) for i in self.fresh if self.entries[i].outs]

    def kept_handles(self) -> list[int]:
        slots = array("i")
        slots.frombytes(self.key[1])
        return [self.base + s for s in slots]


@dataclass
class Outcome:
    """What an executor reports of one program."""

    fetched: list[Tensor] = field(default_factory=list)
    described: list[TensorSpec] = field(default_factory=list)
    relayouts: list[Relayout] = field(default_factory=list)
    receipt: ProgramReceipt | None = None


class Executor(Protocol):
    """Where programs run. All calls come from one thread at a time (the recorder's lock)."""

    #: largest host tensor in bytes that should travel inside a program instead of by `upload`
    inline_bytes: int
    #: instructions after which a program is handed over although nothing is read yet
    chunk: int

    def upload(self, handle: int, tensor: Tensor, is_parameter: bool) -> None:
        """Binds ``handle`` to the content of a dense CPU tensor, as it is now."""

    def execute(self, program: Program, fetch: list[int], describe: list[int]) -> Outcome:
        """Runs the program; ``fetch`` are handles to read back as CPU tensors."""

    def close(self) -> None: ...
