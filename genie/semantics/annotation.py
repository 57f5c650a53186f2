"""`genie.annotate_phase`: what a program's author knows, said in so many words."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import overload

from torch import nn

from genie.frontend import names
from genie.srg.graph import Phase


@overload
def annotate_phase(where: nn.Module, phase: str | None) -> None: ...
@overload
def annotate_phase(where: str) -> AbstractContextManager[None]: ...
def annotate_phase(where: nn.Module | str, phase: str | None = None) -> AbstractContextManager[None] | None:
    """Says that a module, or a block of code, runs in a phase: it wins over what Genie recognises.

    ``annotate_phase(module, "decode")`` holds from now on, before or after the module moves to device
    genie; of annotated modules inside each other the innermost counts. ``annotate_phase(module, None)``
    takes it back. ``with annotate_phase("prefill"):`` holds for what is recorded in the block, and wins over
    modules; it needs an open session, and costs nothing per op. Where evidence says otherwise, the printed
    graph has a note.

    Raises ValueError for what is no phase, for a module that has another phase already, and for one
    without parameters and buffers (nothing in a program tells what is its).
    """
    if isinstance(where, str):
        if phase is not None:
            raise ValueError(f"annotate_phase({where!r}, {phase!r}): give a module first, or a phase alone")
        return _block(_checked(where))
    if not isinstance(where, nn.Module):
        raise ValueError(f"annotate_phase takes a module or a phase, not a {type(where).__name__}")
    said = where.__dict__.get(names.HINT)
    if phase is None:
        where.__dict__.pop(names.HINT, None)
    else:
        phase = _checked(phase)
        name = type(where).__name__
        if said not in (None, phase):
            raise ValueError(
                f"this {name} is annotated {said!r} already, and cannot be {phase!r} too: take that back "
                "with annotate_phase(module, None), or annotate its parts, or use "
                f"`with annotate_phase({phase!r}):` around the calls"
            )
        if next(where.parameters(), None) is None and next(where.buffers(), None) is None:
            raise ValueError(
                f"this {name} has no parameters and no buffers, so nothing in a program can be told to be "
                "its: annotate the module that holds it, or use "
                f"`with annotate_phase({phase!r}):` around the call"
            )
        where.__dict__[names.HINT] = phase
    names.remember(where)
    return None


def _checked(phase: str) -> str:
    known = [p.value for p in Phase if p is not Phase.UNKNOWN]
    if phase not in known:
        raise ValueError(f"{phase!r} is no phase: use one of {', '.join(known)}")
    return str(Phase(phase).value)


@contextmanager
def _block(phase: str) -> Iterator[None]:
    from genie.frontend.session import current

    recorder = current().recorder
    known = recorder.weight_names
    opened = known.open_block(recorder.recorded, phase)
    try:
        yield
    finally:
        known.close_block(opened, recorder.recorded)
