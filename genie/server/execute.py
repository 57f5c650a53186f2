"""Runs `Execute` requests of one session: templates, random state, receipts, stateless replies."""

from __future__ import annotations

import contextlib
import time
from array import array
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from msgspec import structs
from torch import Tensor

from genie.config import ENGINES, MAX_RUN_AHEAD
from genie.errors import GenieError, ProtocolError
from genie.server.ahead import Foreseen, RunAhead, described, to_wires
from genie.server.device import Device
from genie.server.engine import EngineError, OpTable, Template, compile_template, names_of
from genie.server.engines import rewrite
from genie.server.engines.kv import Value
from genie.server.engines.select import Engines
from genie.server.faults import Fault, fault_of
from genie.server.store import HandleStore, storage_key
from genie.server.timing import HostSpan, LateReceipt, Ran, StreamSpan
from genie.server.trace import SessionTrace
from genie.wire.messages import (
    MAX_LANES,
    BriefReceipt,
    Check,
    Configure,
    Execute,
    LiveValue,
    ProgramReceipt,
    Result,
    TemplateBody,
    TensorSpec,
)
from genie.wire.receipts import Abridger
from genie.wire.tensors import bytes_of_storage, spec_of, unpack
from genie.wire.vectors import Predictor, Vectors

MAX_TEMPLATES = 4096
#: values that the predictions of one session's templates may hold
MAX_PREDICTED = 1 << 27


#: see `Executor.execute`
Answer = tuple[Result | LateReceipt, list[memoryview], object]


def ints(data: bytes) -> list[int]:
    """An int64 LE vector of the wire. Raises ProtocolError for a torn one."""
    try:
        return array("q", data).tolist()
    except ValueError:
        raise ProtocolError(f"a vector of int64 has {len(data)} bytes, no multiple of 8") from None


class Executor:
    """Templates, op table and random state of one session, over its handle store."""

    def __init__(self, device: Device, store: HandleStore, max_templates: int = MAX_TEMPLATES) -> None:
        self._device = device
        self._store = store
        self._ops = OpTable(device.torch_device)
        self.trace: SessionTrace | None = None  # while the client takes a profile
        self.templates: dict[int, Template | Fault] = {}
        self.receipts = Abridger()  # of programs without reply
        #: ways to run a template beside instruction by instruction that the session asked for
        self.engines = Engines(device.torch_device, device.graphs)
        self.ahead = RunAhead(self, device, store)
        self._max_templates = max_templates
        #: for each template, whatever became of it, what it ran with last; by lane
        self._predictors: dict[int, dict[int, Predictor]] = {}
        self._predicted = 0  # values held for that
        generator = torch.Generator(device.torch_device)
        generator.seed()
        self._random_state: Tensor = generator.get_state()

    def execute(self, m: Execute, payload: Tensor, deferred: Fault | None) -> Answer:
        """The reply, its payload pieces, and what must stay alive until they are sent; of a quiet program
        what makes its receipt.

        Raises Fault. Then whatever the request was to bind is poisoned, and all its bookkeeping
        (definitions, evictions, releases) is done, so that the client's numbers stay true.
        """
        self._evict(m.evict)
        bound = 0
        vectors = Vectors()
        try:
            if m.template >= 0:
                vectors = self._vectors(m)
            if m.release:
                self._store.free(ints(m.release))
            template = self._template(m)
            if deferred is not None:
                raise deferred
            if isinstance(template, Fault):
                raise Fault(*template.args)
            foreseen = self.ahead.take(m, vectors)
            if foreseen is not None:
                answer = self._hand_over(m, foreseen)
            else:
                if self._store.has_pending:
                    # Other sessions compute while this one waits for another server.
                    self._store.settle([*vectors.ext, *m.fetch, *m.describe])
                device = self._device
                device.waiting.add(self)
                with device.lock:
                    device.waiting.discard(self)
                    if m.inputs:
                        self._bind_inputs(m.inputs, m.storages, payload)
                    bound = len(m.inputs)
                    answer = self._run(m, template, vectors)
            self._store.free(vectors.releases)
            if m.release_after:
                self._store.free(ints(m.release_after))
            return answer
        except Exception as exc:  # whatever it is: it is answered, and logged if nobody foresaw it
            if isinstance(exc, EngineError):
                exc.instruction += m.first
            fault = fault_of(exc, nonce=m.nonce, device=self._device.name)
            self._poison(m, Fault(*fault.args), bound, vectors)
            raise Fault(*fault.args) from exc

    def foresee(self, template: int, lane: int, base: int) -> Vectors:
        """What a template will run with, if the client sends nothing else. It has run in this lane."""
        return self._predictors[template][lane].foresee(base)

    def configure(self, m: Configure) -> None:
        """Raises ProtocolError for what this server does not know."""
        unknown = sorted(set(m.engines) - set(ENGINES))
        if unknown:
            raise ProtocolError(
                f"this server knows no engine {', '.join(unknown)}: choose from {', '.join(ENGINES)}"
            )
        if not 0 <= m.run_ahead <= MAX_RUN_AHEAD:
            raise ProtocolError(
                f"this server runs 0 to {MAX_RUN_AHEAD} windows ahead, not {m.run_ahead}: ask for that many"
            )
        self.engines.enabled = frozenset(m.engines)
        if m.engines:
            rewrite.load()
        graphs = self._device.graphs
        if graphs is not None and graphs.compiler is not None and "compiled" in m.engines:
            graphs.compiler.prepare()
        self.ahead.windows = m.run_ahead

    def take_receipts(self, nonce: str = "") -> list[BriefReceipt]:
        """Those of the programs without reply since the last one; see `Abridger.take`."""
        return self.receipts.take(self.templates, nonce)

    # -- templates -------------------------------------------------------------------------------

    def _evict(self, numbers: list[int]) -> None:
        for number in numbers:
            self.templates.pop(number, None)
            for predictor in self._predictors.pop(number, {}).values():
                self._predicted -= len(predictor)
        self.receipts.forget(numbers)

    def _vectors(self, m: Execute) -> Vectors:
        """Before anything else can fail: the client's prediction of its next vectors counts on these."""
        if m.body is not None:
            if m.template in self._predictors or len(self._predictors) >= self._max_templates:
                raise ProtocolError(
                    f"template {m.template} is defined twice, or over {self._max_templates} are held: "
                    "evict some"
                )
            self._predictors[m.template] = {}
        try:
            lanes = self._predictors[m.template]
        except KeyError:
            raise ProtocolError(
                f"template {m.template} was never sent in this session, or was evicted"
            ) from None
        if not 0 <= m.lane < MAX_LANES:
            raise ProtocolError(f"lane {m.lane} is not among the {MAX_LANES} that a template has")
        predictor = lanes.get(m.lane)
        if predictor is None:
            predictor = lanes[m.lane] = Predictor()
        held = len(predictor)
        vectors = predictor.decode(m.vectors, m.base)
        self._predicted += len(predictor) - held
        if self._predicted > MAX_PREDICTED:
            raise ProtocolError(f"templates hold over {MAX_PREDICTED} ints and handles: evict some")
        return vectors

    def _template(self, m: Execute) -> Template | Fault | None:
        if m.template < 0:
            return None
        if m.body is not None:
            self.templates[m.template] = self._compile(m.body, m.nonce)
        try:
            return self.templates[m.template]
        except KeyError:
            raise ProtocolError(f"template {m.template} came in a request that was refused") from None

    def _compile(self, body: TemplateBody, nonce: str) -> Template | Fault:
        failure: Exception | None = None
        for definition in body.defs:
            # All of them, whatever fails: the client counts each as sent.
            try:
                self._ops.define(definition)
            except (GenieError, RuntimeError, ValueError, TypeError) as exc:
                failure = failure or exc
        if failure is None:
            try:
                return compile_template(structs.replace(body, defs=[]), self._ops, self._device.torch_device)
            except (GenieError, RuntimeError, ValueError, TypeError, SyntaxError, RecursionError) as exc:
                failure = exc
        return Fault(*fault_of(failure, nonce=nonce, device=self._device.name).args)

    def _poison(self, m: Execute, fault: Fault, bound: int, vectors: Vectors) -> None:
        template = self.templates.get(m.template)
        kept: Iterable[int] = ()
        if isinstance(template, Template):
            kept = template.kept_names
        elif m.body is not None:
            with contextlib.suppress(ProtocolError):  # it names none: that is its fault, or one of them
                kept = names_of(m.body)
        self._store.poison((m.base + name for name in kept), fault)
        self._store.poison((h for h, _ in m.inputs[bound:]), fault)
        self._store.free(vectors.releases)
        if len(m.release_after) % 8 == 0:
            self._store.free(ints(m.release_after))
        if m.stateless:
            self._store.forget_results()

    # -- running ---------------------------------------------------------------------------------

    def _bind_inputs(
        self, inputs: list[tuple[int, TensorSpec]], storages: list[int], payload: Tensor
    ) -> None:
        specs = [s for _, s in inputs]
        tensors = unpack(payload, specs, storages)
        if self._device.is_cuda:
            tensors = self._move(tensors, specs)
        bind = self._store.bind
        for (handle, _), tensor in zip(inputs, tensors, strict=True):
            bind(handle, tensor)

    def _move(self, tensors: list[Tensor], specs: list[TensorSpec]) -> list[Tensor]:
        """Copies to the GPU, keeping shared storages shared."""
        storages: dict[int, torch.UntypedStorage] = {}
        moved = []
        for tensor, spec in zip(tensors, specs, strict=True):
            key = storage_key(tensor)
            if key not in storages:
                flat = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
                storages[key] = self._device.to_device(flat).untyped_storage()
            empty = torch.empty(0, dtype=tensor.dtype, device=self._device.torch_device)
            offset = spec.offset if spec.storage >= 0 else 0
            moved.append(empty.set_(storages[key], offset, spec.shape, spec.stride))
        return moved

    def _run(self, m: Execute, template: Template | None, vectors: Vectors) -> Answer:
        store = self._store
        counters: dict[str, int] = {}
        live: list[int] = []
        ran = None
        if template is not None:
            handles = vectors.ext
            # What is in place may stay so where the program neither writes to it nor sends it away.
            in_place = not (m.stateless or template.mutated_ext)
            ext: list[Any] = store.peek_all(handles) if in_place else store.get_all(handles)
            if template.mutated_ext:
                copies = store.before_write(
                    (ext[i] for i in template.mutated_ext), still_pristine=m.stateless
                )
                if copies:
                    counters["private_copies"] = copies
                    ext = store.get_all(handles)
            versions = [t._version for t in ext] if m.stateless else ()
            ran = self.compute(template, m.lane, ext, vectors, m.checks)
            if m.stateless:
                counters["stateless"] = 1
                # What was written is a storage. Version counters alone do not tell: normalisation ops
                # write to their running statistics without counting it.
                keys = {
                    storage_key(t) for t, before in zip(ext, versions, strict=True) if t._version != before
                } | {storage_key(ext[i]) for i in template.mutated_ext}
                store.written(keys)
                live = [h for h, t in zip(handles, ext, strict=True) if storage_key(t) in keys]
                live = list(dict.fromkeys(live))
                live += [
                    m.base + n for n, v in zip(template.kept_names, ran.values, strict=True) if v is not None
                ]
            store.bind_kept(m.base, template.kept_names, ran.values)
            if store.limit:
                store.reserve(0)
        return self._answer(m, ran, self._receipt(m, template, ran, counters), live)

    def compute(
        self, template: Template, lane: int, ext: Sequence[Value], vectors: Vectors, checks: list[Check]
    ) -> Ran:
        """Runs a template on the values of its externals. The device's lock is held. Binds nothing.

        Raises ProtocolError for vectors of other lengths than the template's, EngineError, or what the
        device raises."""
        literals, floats, handles, _ = vectors
        if (len(literals), len(floats), len(handles)) != (
            template.n_literals,
            template.n_floats,
            template.n_ext,
        ):
            raise ProtocolError(
                f"template {template.digest.hex()[:12]} takes {template.n_literals} ints, "
                f"{template.n_floats} floats and {template.n_ext} externals, not {len(literals)}, "
                f"{len(floats)} and {len(handles)}"
            )
        device = self._device
        tick = self.trace.tick if self.trace is not None else None
        # Elsewhere nothing waits for the device: the next program is prepared while this one runs.
        timed = self.trace is not None or self.engines.wants_time(template, lane)
        span = StreamSpan() if device.is_cuda and not timed else HostSpan(device.synchronize)
        cpu = time.process_time()
        if template.draws(floats):
            generator = device.generator
            generator.set_state(self._random_state)
            try:
                ran = self.engines.run(template, lane, ext, literals, floats, checks, tick)
            finally:
                self._random_state = generator.get_state()
        else:
            ran = self.engines.run(template, lane, ext, literals, floats, checks, tick)
        span.stop()
        if isinstance(span, HostSpan):
            self.engines.took(span.ns * 1e-9)
            if self.trace is not None:
                self.trace.executed(span.start, span.end, template)
        return Ran(ran.values, ran.relayouts, span, time.process_time() - cpu, ran.counters)

    def _hand_over(self, m: Execute, foreseen: Foreseen) -> Answer:
        """As `_run`, of a program that ran ahead."""
        template, ran = foreseen.template, foreseen.ran
        assert ran is not None
        self._store.bind_kept(m.base, template.kept_names, ran.values)
        self.ahead.handed_over()
        receipt = self._receipt(m, template, ran, {})
        if m.quiet:
            return receipt, [], None
        fetched, pieces, owners = to_wires(foreseen.read())
        return Result(receipt(), fetched=fetched, described=foreseen.described), pieces, owners

    def _receipt(
        self, m: Execute, template: Template | None, ran: Ran | None, counters: dict[str, int]
    ) -> LateReceipt:
        device = self._device
        missed_cpu_s = self.ahead.bill(m, counters)
        if template is None or ran is None:
            empty = ProgramReceipt(device.pid, device.name, m.nonce, 0, b"", 0.0, missed_cpu_s, counters)
            return lambda: empty
        counters |= ran.counters
        if template.replay:
            counters["replayed"] = 1
        if ran.relayouts:
            counters["relayouts"] = len(ran.relayouts)
        # Nothing else of the program may live until its receipt is told: not what it kept.
        nonce, ops, digest = m.nonce, template.n_ops, template.digest
        span, cpu_s = ran.span, ran.cpu_s + missed_cpu_s

        def receipt() -> ProgramReceipt:
            ns = 0 if device.lost else span.ns
            device.was_busy(ns)
            return ProgramReceipt(device.pid, device.name, nonce, ops, digest, ns * 1e-6, cpu_s, counters)

        return receipt

    def _answer(self, m: Execute, ran: Ran | None, receipt: LateReceipt, live: list[int]) -> Answer:
        if m.quiet:
            return receipt, [], None
        store = self._store
        pieces: list[memoryview] = []
        owners: list[object] = []
        values: list[LiveValue] = []
        sizes: list[int] = []
        fetched: list[TensorSpec] = []
        if m.stateless:
            values, sizes, storages = self._live_values(live)
            pieces += map(bytes_of_storage, storages)
            owners += storages
        if m.fetch:
            fetched, data, copies = to_wires(self._device.transfers.to_host(store.get_all(m.fetch)))
            pieces += data
            owners += copies
        told = list(map(described, store.get_all(m.describe))) if m.describe else []
        if m.stateless:
            store.forget_results()
        relayouts = ran.relayouts if ran is not None else []
        result = Result(
            receipt(), fetched=fetched, described=told, relayouts=relayouts, live=values, storages=sizes
        )
        return result, pieces, owners

    def _live_values(
        self, handles: list[int]
    ) -> tuple[list[LiveValue], list[int], list[torch.UntypedStorage]]:
        """Live values as unique storages; what the client uploaded, and nobody wrote to, stays here."""
        values: list[LiveValue] = []
        index: dict[int, int] = {}
        storages: list[torch.UntypedStorage] = []
        for handle, tensor in zip(handles, self._store.get_all(handles), strict=True):
            key = storage_key(tensor)
            resident = self._store.pristine_handle(key)
            if resident is not None:
                values.append(LiveValue(handle, spec_of(tensor, storage=-2), resident))
                continue
            if tensor.is_conj() or tensor.is_neg():
                tensor = tensor.resolve_conj().resolve_neg()
                key = storage_key(tensor)
            if key not in index:
                index[key] = len(storages)
                storage = tensor.untyped_storage()
                storages.append(storage)
            values.append(LiveValue(handle, spec_of(tensor, storage=index[key])))
        if self._device.is_cuda:
            flat = [torch.empty(0, dtype=torch.uint8, device=s.device).set_(s) for s in storages]
            storages = [t.untyped_storage() for t in self._device.transfers.to_host(flat)]
        return values, [s.nbytes() for s in storages], storages
