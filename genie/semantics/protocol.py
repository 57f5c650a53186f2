"""What a recognizer is."""

from __future__ import annotations

from typing import Protocol

from genie.srg.graph import Graph


class Recognizer(Protocol):
    """Fills in what it recognises in a graph of its own; leaves alone what another has filled in.

    It sets phase, residency, modality, module, stage and branch, never the wiring. Without evidence it
    sets nothing.
    """

    def __call__(self, graph: Graph) -> None: ...
