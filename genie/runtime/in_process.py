"""An executor in this very process: what capture costs, without a network (`genie.local`)."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

from genie.errors import GenieError, RemoteOpError
from genie.frontend.entries import definition
from genie.frontend.program import Outcome, Program
from genie.frontend.session import Session
from genie.frontend.specs import spec_of, to_wire
from genie.profiling.recording import InProcessTrace
from genie.runtime.graphs import GraphKey, TemplateGraphs
from genie.server.engine import EngineError, OpTable, Template, compile_template
from genie.server.store import HandleStore
from genie.srg.graph import Graph

MAX_TEMPLATES = 4096


class InProcessExecutor:
    """Runs programs on ``device`` in this process. CPU parameters are used by reference.

    A parameter that the program writes to is copied first. One that the *host* writes to after it
    was moved would change under the session: that raises, because the old content is gone.

    ``busy_s`` are the seconds spent on running programs, ``annotate_s`` those spent on the graphs of
    new templates; neither contains the other. ``max_templates`` programs and their graphs are kept.
    """

    inline_bytes = 8192
    chunk = 4096

    def __init__(self, device: torch.device, max_templates: int = MAX_TEMPLATES) -> None:
        self.device = device
        self.store = HandleStore()
        self.busy_s = 0.0
        self.trace: InProcessTrace | None = None  # while a profile is taken
        self.on_cuda = device.type == "cuda"
        self._ops = OpTable(device)
        self._defined: set[int] = set()
        self._templates: dict[tuple[bytes, bytes], Template] = {}
        self._by_reference: dict[int, tuple[Tensor, int]] = {}
        self._parameters: set[int] = set()
        self._max_templates = max_templates
        self._graphs = TemplateGraphs(max_templates)
        self._random_state: Tensor | None = None

    @property
    def graphs(self) -> dict[GraphKey, Graph]:
        """The annotated graph of every template that has run."""
        return self._graphs.graphs

    @property
    def annotate_s(self) -> float:
        return self._graphs.spent_s

    def upload(self, handle: int, tensor: Tensor, is_parameter: bool) -> None:
        if is_parameter:
            self._parameters.add(handle)
        if self.device.type != "cpu":
            self.store.bind(handle, tensor.to(self.device))
        elif is_parameter:
            self.store.bind(handle, tensor, shared=True)
            self._by_reference[handle] = (tensor, tensor._version)
        else:
            self.store.bind(handle, tensor.clone(memory_format=torch.preserve_format))

    def synchronize(self) -> None:
        if self.on_cuda:
            torch.cuda.synchronize(self.device)

    def _template(self, program: Program) -> Template:
        template = self._templates.get(program.key)
        if template is None:
            for tid in program.tids():
                if tid not in self._defined:
                    self._ops.define(definition(tid))
                    self._defined.add(tid)
            template = compile_template(program.body([]), self._ops, self.device)
            if len(self._templates) >= self._max_templates:
                self._templates.pop(next(iter(self._templates)))
            self._templates[program.key] = template
        return template

    def execute(self, program: Program, fetch: list[int], describe: list[int]) -> Outcome:
        started, annotated = time.perf_counter(), self.annotate_s
        trace, failed = self.trace, True
        if trace is not None:
            trace.received(program, bool(program.entries) and program.key not in self._templates)
        try:
            with torch.no_grad():
                outcome = self._execute(program, fetch, describe)
            failed = False
        except EngineError as exc:
            error = RemoteOpError(f"{exc.op} failed: {exc.__cause__}")
            error.instruction = exc.instruction + program.first  # type: ignore[attr-defined]
            self.store.poison(program.kept_handles(), error)
            raise error from exc
        finally:
            if trace is not None:
                trace.server.finished(failed)
            self.busy_s += time.perf_counter() - started - (self.annotate_s - annotated)
        return outcome

    def _execute(self, program: Program, fetch: list[int], describe: list[int]) -> Outcome:
        store = self.store
        for handle, value in program.inputs:
            store.bind(handle, value.to(self.device))
        outcome = Outcome()
        if program.entries:
            template = self._template(program)
            if self._by_reference:
                self._check_references(program.ext)
            ext = store.get_all(program.ext)
            if self._graphs.unseen(program):
                self._graphs.add(program, ext, self._parameters, fetch)
            if template.mutated_ext:
                for k in template.mutated_ext:
                    self._by_reference.pop(program.ext[k], None)
                if store.before_write([ext[k] for k in template.mutated_ext]):
                    ext = store.get_all(program.ext)
            trace = self.trace.server if self.trace is not None else None
            started = time.perf_counter_ns()
            kept, outcome.relayouts = self._run(template, ext, program, trace.tick if trace else None)
            if trace is not None:
                self.synchronize()
                trace.executed(started, time.perf_counter_ns(), template)
            store.bind_kept(program.base, template.kept_names, kept)
        outcome.fetched = [_to_host(store.get(h)) for h in fetch]
        outcome.described = [to_wire(spec_of(store.get(h))) for h in describe]
        if program.release:
            store.free(program.release)
            self._parameters.difference_update(program.release)
            for h in program.release:
                self._by_reference.pop(h, None)
        return outcome

    def _check_references(self, handles: list[int]) -> None:
        get = self._by_reference.get
        for h in handles:
            found = get(h)
            if found is not None and found[0]._version != found[1]:
                raise GenieError(
                    "a CPU parameter was written to after it had been moved to device 'genie' by reference: "
                    "move a clone (module.to(...) of a deepcopy), or write to the module on the device"
                )

    def _run(
        self, template: Template, ext: list[Tensor], program: Program, tick: Callable[[], None] | None
    ) -> tuple:
        """Random ops draw from the session's own state; the host's generator is left as it was."""
        if not template.random:
            return template.run(ext, program.literals, program.floats, program.checks(), tick)
        generator = (
            torch.default_generator
            if self.device.type == "cpu"
            else torch.cuda.default_generators[self.device.index or 0]
        )
        host_state = generator.get_state()
        if self._random_state is None:
            own = torch.Generator(self.device)
            own.seed()
            self._random_state = own.get_state()
        generator.set_state(self._random_state)
        try:
            return template.run(ext, program.literals, program.floats, program.checks(), tick)
        finally:
            self._random_state = generator.get_state()
            generator.set_state(host_state)

    def close(self) -> None:
        self.store.clear()
        self._templates.clear()
        self._by_reference.clear()


def _to_host(t: Tensor) -> Tensor:
    """A copy that later programs cannot change."""
    return t.cpu() if t.device.type != "cpu" else t.clone(memory_format=torch.preserve_format)


def local(device: str | torch.device = "cpu", *, replay: bool = False) -> Session:
    """A session that executes what it captures in this process. Use as a context manager.

    ``replay``: see `Session`.
    """
    return Session(InProcessExecutor(torch.device(device)), replay=replay)
