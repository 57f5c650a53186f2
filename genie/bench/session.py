"""What one pytest run of the suite shares between its cells.

The plugin's fixtures live on this module, so torch is imported only when a cell asks for something.
"""

from __future__ import annotations

import gc
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from genie.bench.options import Options
from genie.bench.progress import Progress
from genie.bench.receipts import ReceiptBook
from genie.errors import MeasurementError

if TYPE_CHECKING:
    from genie.bench.pool import ServerPool
    from genie.bench.reference import Reference
    from genie.devices import DeviceSlot
    from genie.runtime.open_pool import PoolCosts
    from genie.workloads.protocol import Workload


@dataclass(frozen=True)
class Repeats:
    """How often a cell's request is run: once cold, ``warmups`` times untimed, ``rounds`` times timed."""

    rounds: int
    warmups: int


#: enough rounds for a median and quartiles within the wall-clock budget of each profile. Two warm-ups at
#: least: after the cold request one compiles, and the next schedules and moves weights to where they are used
REPEATS = {"smoke": Repeats(3, 2), "cpu": Repeats(5, 2), "gpu": Repeats(20, 3)}


@dataclass
class LocalTimes:
    """Medians of ``local_pytorch`` for one workload, by case: what its cells' ratios divide by."""

    cases: dict[str, float]


class BenchSession:
    """Resolved options, and everything that outlives a cell. One per pytest process."""

    def __init__(self, options: Options, *, parallel: bool) -> None:
        self.options = options
        #: under xdist cells run side by side: nothing is pinned, nothing is timed
        self.parallel = parallel
        self.receipts = ReceiptBook()
        self.local_times: dict[str, LocalTimes] = {}
        #: the servers, once a cell has needed them
        self.pool: ServerPool | None = None
        self.progress = Progress()
        #: files of --genie-trace written so far
        self.traces: list[Path] = []
        #: of any timed cell so far
        self.most_devices = 1
        #: what that many devices reach at best, once it was measured (see genie.bench.ceiling)
        self.ceiling: dict[str, Any] | None = None
        #: what models of timed cells computed in, and what the local device reaches in each at most
        self.timed_dtypes: set[str] = set()
        self.limits: list[dict[str, Any]] = []
        self._workloads: dict[str, Workload] = {}
        self._references: dict[str, Reference] = {}

    @cached_property
    def device_type(self) -> str:
        from genie.devices import resolve_device_type

        return resolve_device_type(self.options.device)

    @cached_property
    def profile(self) -> str:
        return self.options.profile or ("gpu" if self.device_type == "cuda" else "cpu")

    @property
    def local_slot(self) -> DeviceSlot:
        """The one device of ``local_pytorch``, also the reference's."""
        from genie.devices import device_slot

        return device_slot(self.device_type, 0)

    @cached_property
    def server_slots(self) -> list[DeviceSlot]:
        from genie.devices import device_slot

        return [device_slot(self.device_type, index) for index in range(self.server_count)]

    @property
    def server_count(self) -> int:
        """Asked for, or (where the user does not say) one per device of this host."""
        if self.options.addresses:
            return len(self.options.addresses)
        if self.options.servers is not None:
            return self.options.servers
        if self.device_type == "cuda":
            import torch

            return torch.cuda.device_count()
        from genie.devices import available_cores, cores_per_device

        return min(2, len(available_cores()) // cores_per_device())

    def repeats(self, workload: str) -> Repeats:
        default = REPEATS[self.profile]
        asked = self.options.rounds
        return Repeats(asked.get(workload) or asked.get("") or default.rounds, default.warmups)

    def workload(self, source: Any, params: dict[str, Any]) -> Workload:
        """The workload of a cell: a registered name, or a factory with the signature of one."""
        key = f"{source}:{sorted(params.items())}"
        if key not in self._workloads:
            if callable(source):
                made = source(self.profile, weights=self.options.weights, **params)
            else:
                from genie.workloads import make_workload

                made = make_workload(source, self.profile, weights=self.options.weights, **params)
            self._workloads[key] = made
        return self._workloads[key]

    def reference(self, workload: Workload) -> Reference:
        key = cell_group(workload)
        if key not in self._references:
            from genie.bench.reference import Reference

            self._references[key] = Reference(workload, self.local_slot)
        return self._references[key]

    def fingerprint(self, baseline: str, remote: bool) -> dict[str, Any]:
        """Of a cell (see genie.bench.fingerprint). The peers' pools are always on this host."""
        from genie.bench.fingerprint import fingerprint
        from genie.device_facts import device_facts

        if not remote:
            return fingerprint([device_facts(self.local_slot)])
        uses = 1 if baseline == ONE_SERVER else None
        if self.pool is not None and baseline.startswith("genie_"):
            return fingerprint(self.pool.facts(uses or len(self.pool.addresses)))
        return fingerprint([device_facts(slot) for slot in self.server_slots[:uses]])

    @cached_property
    def pool_costs(self) -> PoolCosts | None:
        """What the scheduler of ``genie_full`` predicts with; measured once on devices that it is not stored
        for. None for a pool of one, where there is nothing to schedule."""
        if self.pool is None or len(self.pool.addresses) < 2:
            return None
        from genie.cost.pool import pool_costs

        return pool_costs(self.pool.addresses, self.pool.token, tls_ca=self.pool.tls_ca)

    def measure_ceiling(self) -> None:
        """Once, when timed cells used several devices; servers elsewhere say nothing about this machine."""
        options = self.options
        elsewhere = options.addresses or options.launch.launcher == "ray"
        if self.most_devices < 2 or self.ceiling is not None or elsewhere or not options.ceiling:
            return
        from genie.bench.ceiling import measure_ceiling

        try:
            self.ceiling = measure_ceiling(self.server_slots[: self.most_devices])
        except MeasurementError as error:
            # The cells are measured and valid without it: the summary and the file say that it is missing.
            self.ceiling = {"devices": self.most_devices, "error": str(error)}

    def measure_limits(self) -> None:
        """Once, after timed cells; at the sizes of tests a request's least time says nothing."""
        if self.limits or not self.timed_dtypes or not self.options.ceiling or self.profile == "smoke":
            return
        import torch

        from genie.bench.limits import measure_limits
        from genie.bench.placement import placed

        slot = self.local_slot
        with placed(slot.cores):
            for dtype in sorted(self.timed_dtypes):
                try:
                    self.limits.append(measure_limits(slot, dtype))
                except torch.OutOfMemoryError as error:
                    # The cells are valid without it: the file says that it is missing.
                    self.limits.append({"dtype": dtype, "error": str(error)})

    def close(self) -> None:
        self._references.clear()
        self._workloads.clear()
        gc.unfreeze()  # what genie.bench.heap froze


def cell_group(workload: Workload) -> str:
    """Name of the table that a cell belongs to: the workload, with parameters that are not the default."""
    return workload.name + "".join(f" {name}={value}" for name, value in sorted(workload.params.items()))


#: the one remote baseline that never uses more than the first server, whatever the pool
ONE_SERVER = "genie_local_remote"
OPTIONS = pytest.StashKey[Options]()
SESSION = pytest.StashKey[BenchSession]()


def session_of(config: pytest.Config) -> BenchSession:
    """The run's session, made by the first cell that is collected."""
    if SESSION not in config.stash:
        config.stash[SESSION] = BenchSession(config.stash[OPTIONS], parallel=is_parallel(config))
    return config.stash[SESSION]


def is_parallel(config: pytest.Config) -> bool:
    return hasattr(config, "workerinput") or config.getoption("dist", "no") != "no"
