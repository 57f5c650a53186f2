"""Graphs of what a function does on device genie, recorded and run in this process."""

from __future__ import annotations

from collections.abc import Callable

import torch

import genie
from genie.frontend.session import Session
from genie.runtime.in_process import InProcessExecutor
from genie.srg.graph import Graph


def graphs_of(run: Callable[[], object]) -> list[Graph]:
    """The annotated graphs of all templates that ``run`` makes, in order."""
    with torch.no_grad(), genie.local() as session:
        run()
        return graphs(session)


def graphs(session: Session) -> list[Graph]:
    assert isinstance(session.executor, InProcessExecutor)
    return [g for g in session.executor.graphs.values() if g.nodes]


def largest(run: Callable[[], object]) -> Graph:
    return max(graphs_of(run), key=lambda g: len(g.nodes))


def node(graph: Graph, name: str):
    """The only instruction of this name."""
    (found,) = (n for n in graph.nodes if n.name == name)
    return found


def mlp() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.GELU(), torch.nn.Linear(16, 4)).to("genie")
    model(torch.ones(2, 8).to("genie") * 2.5).cpu()
