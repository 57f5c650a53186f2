"""Execution that keeps nothing but weights on the servers: what a runtime without semantics must do.

Nothing says which results are state, so every live one comes back at each sync and travels out again
with the next program that uses it. Values keep their aliasing: whole storages travel, with geometry.
"""

from __future__ import annotations

from copy import copy
from itertools import cycle

import torch
from torch import Tensor

from genie.errors import GenieError, RemoteError
from genie.frontend.program import Outcome, Program
from genie.frontend.specs import spec_of as frontend_spec_of
from genie.frontend.specs import to_wire as spec_to_wire
from genie.runtime.connection import live_tensors
from genie.runtime.link import ServerLink, int64s
from genie.wire.messages import TensorSpec
from genie.wire.tensors import bytes_of_storage, spec_of


class StatelessExecutor:
    """Programs go to ``links`` in turn (or always to the first); state lives on the client.

    Weights are uploaded once to each server that needs them.
    """

    inline_bytes = 64 << 10
    #: state travels at syncs only, so a program is cut no earlier than it must be
    chunk = 4096

    def __init__(self, links: list[ServerLink], *, round_robin: bool) -> None:
        self.links = tuple(links)
        self._turn = cycle(range(len(links) if round_robin else 1))
        self._weights: dict[int, tuple[Tensor, int, bool]] = {}
        self._resident: list[set[int]] = [set() for _ in links]
        self._values: dict[int, Tensor] = {}
        self._dead: list[list[int]] = [[] for _ in links]
        self._failed: dict[int, RemoteError] = {}

    def upload(self, handle: int, tensor: Tensor, is_parameter: bool) -> None:
        # Sent to a server when a program there needs it; a parameter is kept by reference until then.
        kept = tensor if is_parameter else tensor.clone(memory_format=torch.preserve_format)
        self._weights[handle] = (kept, kept._version, is_parameter)

    def execute(self, program: Program, fetch: list[int], describe: list[int]) -> Outcome:
        self._values.update(program.inputs)
        outcome = Outcome()
        if program.entries:
            outcome = self._run(program)
        outcome.fetched = [self._host(h).clone(memory_format=torch.preserve_format) for h in fetch]
        outcome.described = [spec_to_wire(frontend_spec_of(self._host(h))) for h in describe]
        for handle in program.release:
            self._forget(handle)
        return outcome

    def _run(self, program: Program) -> Outcome:
        index = next(self._turn)
        link = self.links[index]
        specs: list[tuple[int, TensorSpec]] = []
        storages: dict[int, int] = {}
        owners: list[torch.UntypedStorage] = []
        for handle in program.ext:
            value = self._values.get(handle)
            if value is None:
                self._place(handle, index)
                continue
            storage = value.untyped_storage()
            number = storages.get(storage._cdata)
            if number is None:
                number = storages[storage._cdata] = len(owners)
                owners.append(storage)
            specs.append((handle, spec_of(value, number)))
        request = link.message(
            program,
            inputs=specs,
            storages=[s.nbytes() for s in owners],
            stateless=True,
            release=int64s(self._dead[index]),
        )
        self._dead[index] = []
        link.timings.capture += program.capture_s
        link.send(request, [bytes_of_storage(s) for s in owners])
        try:
            result, payload = link.receive()
        except RemoteError as exc:
            self._failed.update(dict.fromkeys(program.kept_handles(), exc))
            raise
        self._take(live_tensors(result, payload), program.base)
        for kept in result.live:
            if kept.spec.storage < 0:
                self._values[kept.handle] = self._view_of_weight(kept.resident, kept.spec)
        return Outcome(relayouts=result.relayouts, receipt=result.receipt)

    def _take(self, live: dict[int, Tensor], base: int) -> None:
        """Adopts the live results. What was written replaces its old storage in all its aliases."""
        replaced: dict[int, torch.UntypedStorage] = {}
        for handle, tensor in live.items():
            if handle < base:
                replaced[self._host(handle).untyped_storage()._cdata] = tensor.untyped_storage()
                if handle in self._weights:
                    self._drop_weight(handle)  # it is state from now on
        if replaced:
            for handle, value in self._values.items():
                storage = replaced.get(value.untyped_storage()._cdata)
                if storage is not None:
                    self._values[handle] = torch.empty(0, dtype=value.dtype).set_(
                        storage, value.storage_offset(), value.shape, value.stride()
                    )
        self._values.update(live)

    def _host(self, handle: int) -> Tensor:
        value = self._values.get(handle)
        return self._weight(handle) if value is None else value

    def _weight(self, handle: int) -> Tensor:
        try:
            tensor, version, _ = self._weights[handle]
        except KeyError:
            raise copy(self._failed[handle]) from None
        if tensor._version != version:
            raise GenieError(
                "a CPU parameter was written to after it had been moved to device 'genie': "
                "move a copy, or write to the module on the device"
            )
        return tensor

    def _place(self, handle: int, index: int) -> None:
        if handle not in self._resident[index]:
            tensor = self._weight(handle)
            self.links[index].upload(handle, tensor, self._weights[handle][2])
            self._resident[index].add(handle)

    def _view_of_weight(self, handle: int, spec: TensorSpec) -> Tensor:
        weight = self._weight(handle)
        return weight.as_strided(spec.shape, spec.stride, spec.offset + weight.storage_offset())

    def _drop_weight(self, handle: int) -> None:
        self._weights.pop(handle, None)
        for index, resident in enumerate(self._resident):
            if handle in resident:
                resident.remove(handle)
                self._dead[index].append(handle)

    def _forget(self, handle: int) -> None:
        self._values.pop(handle, None)
        self._failed.pop(handle, None)
        if handle in self._weights:
            self._drop_weight(handle)

    def close(self) -> None:
        self._values.clear()
        self._weights.clear()
        for link in self.links:
            link.close()
