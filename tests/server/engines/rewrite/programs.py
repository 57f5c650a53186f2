"""Programs as a server gets them: captured from a function or a model, and run with and without rewrites."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from genie.frontend.session import Session
from genie.runtime.in_process import InProcessExecutor
from genie.server.engine import Template
from genie.server.engines.rewrite.facts import kept, spec
from genie.server.engines.specialize import Observation, specialize


@dataclass(frozen=True)
class Run:
    """One run of a program."""

    template: Template
    ext: list[Tensor]
    literals: list[int]
    floats: list[float]

    def specialized(self) -> tuple[fx.Graph, list[Tensor | None]]:
        """The program, and what it keeps when run instruction by instruction."""
        seen = Observation(self.ext)
        values = self.template.run(self.ext, self.literals, self.floats, [], see=seen.add)[0]
        return specialize(self.template, self.literals, self.floats, seen), values


class Recording(InProcessExecutor):
    """Remembers each run."""

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))
        self.runs: list[Run] = []

    def _run(self, template: Template, ext: list[Tensor], program: Any, tick: Any) -> tuple:
        self.runs.append(Run(template, list(ext), list(program.literals), list(program.floats)))
        return super()._run(template, ext, program, tick)


def moved(value: Any) -> Any:
    return value.to("genie") if isinstance(value, (Tensor, torch.nn.Module)) else value


def captured(function: Callable[..., Any], *inputs: Any) -> Run:
    """The program of one call of ``function`` on device genie; what it returns is kept."""
    executor = Recording()
    with Session(executor) as session, torch.no_grad():
        arguments = [moved(i) for i in inputs]
        session.synchronize()
        before = len(executor.runs)
        results = function(*arguments)
        for r in results if isinstance(results, (tuple, list)) else [results]:
            r.cpu()
        return executor.runs[before]


def decoded(model: torch.nn.Module, ids: Tensor) -> Run:
    """The program of the most common step of a greedy `generate`."""
    executor = Recording()
    with Session(executor) as session, torch.no_grad():
        model = model.to("genie")
        session.synchronize()
        model.generate(
            ids.to("genie"),
            attention_mask=torch.ones_like(ids).to("genie"),
            min_new_tokens=6,
            max_new_tokens=6,
            do_sample=False,
            pad_token_id=0,
        ).cpu()
    return executor.runs[3]


def execute(graph: fx.Graph, ext: list[Tensor]) -> list[Tensor | None]:
    return fx.GraphModule({}, graph)(*ext)


def assert_kept(graph: fx.Graph, run: Run, expected: list[Tensor | None], **tolerance: float) -> None:
    """The program keeps the same values in the same layouts; the graph's specs are what comes out."""
    values = execute(graph, run.ext)
    assert len(values) == len(expected)
    for node, value, want in zip(kept(graph), values, expected, strict=True):
        if want is None:
            assert value is None
            continue
        assert value is not None and node is not None
        torch.testing.assert_close(value, want, equal_nan=True, **tolerance)
        s = spec(node)
        assert s is not None
        assert (s.shape, s.dtype) == (tuple(value.shape), value.dtype) == (tuple(want.shape), want.dtype)
        for size, *strides in zip(value.shape, s.stride, value.stride(), want.stride(), strict=True):
            assert size <= 1 or len(set(strides)) == 1
    addresses = [v.untyped_storage().data_ptr() for v in [*run.ext, *values] if v is not None and v.numel()]
    before = [v.untyped_storage().data_ptr() for v in [*run.ext, *expected] if v is not None and v.numel()]
    assert [addresses.index(a) for a in addresses] == [before.index(a) for a in before]  # who shares memory


def rewrite(run: Run, apply: Callable[[fx.Graph], int], **tolerance: float) -> tuple[int, fx.Graph]:
    """Applies one pass; the kept values must stay as they were, without a tolerance bit by bit."""
    graph, expected = run.specialized()
    changed = apply(graph)
    graph.lint()
    assert_kept(graph, run, expected, **(tolerance or {"rtol": 0, "atol": 0}))
    return changed, graph


def ops(graph: fx.Graph) -> list[str]:
    """The names of the ops that are called, in order."""
    return [n.target._schema.name.split("::")[1] for n in graph.nodes if hasattr(n.target, "_schema")]
