"""What one request cost a GPU: peak memory, energy, utilisation, and the clocks that it ran at.

Memory is torch's of this process, all its sessions together; energy and utilisation are the driver's of the
whole GPU. Where there is no GPU there is no reading, and one line of why.
"""

from __future__ import annotations

import time

import msgspec
import torch

from genie import nvml


class GpuUse(msgspec.Struct, array_like=True, frozen=True):
    """A GPU between `GpuMeter.start` and `GpuMeter.read`; None for what is not known, with ``why``.

    ``peak_allocated``, ``peak_reserved``: bytes, of torch's allocator. ``energy_mj``: of the whole GPU, by a
    counter that moves some ten times a second: a short request's is coarse, so sum over many. ``seconds``:
    between start and read. ``utilization``: percent, see `genie.nvml.GpuState`. Clocks, power limit and
    ``slowed_by`` are those at `read`.
    """

    uuid: str | None = None
    peak_allocated: int | None = None
    peak_reserved: int | None = None
    energy_mj: int | None = None
    seconds: float = 0.0
    utilization: int | None = None
    sm_mhz: int | None = None
    memory_mhz: int | None = None
    power_limit_w: float | None = None
    slowed_by: list[str] | None = None
    why: str = ""


class GpuMeter:
    """Of one torch device. ``why`` says what it cannot tell, "" when it can tell all."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._driver: nvml.Driver | None = None
        self._handle: object = None
        self._uuid: str | None = None
        self._energy_mj: int | None = None
        self._started = 0.0
        if device.type != "cuda":
            self.why = "no GPU: the device is a CPU"
            return
        self._uuid = str(torch.cuda.get_device_properties(device).uuid)
        self._driver, self.why = nvml.load()
        if self._driver is not None:
            self._handle = self._driver.by_uuid(self._uuid)
            self.why = self._driver.why if self._handle is None else ""

    @property
    def has_gpu(self) -> bool:
        return self._device.type == "cuda"

    def start(self) -> None:
        """Right before a request, while the device is idle."""
        if self.has_gpu:
            torch.cuda.reset_peak_memory_stats(self._device)
            self._energy_mj = self._state().energy_mj
        self._started = time.perf_counter()

    def read(self) -> GpuUse | None:
        """Right after it, as often as wanted. None without a GPU."""
        if not self.has_gpu:
            return None
        seconds = time.perf_counter() - self._started
        state = self._state()
        both = state.energy_mj is not None and self._energy_mj is not None
        return GpuUse(
            uuid=state.uuid or self._uuid,
            peak_allocated=torch.cuda.max_memory_allocated(self._device),
            peak_reserved=torch.cuda.max_memory_reserved(self._device),
            energy_mj=state.energy_mj - self._energy_mj if both else None,  # type: ignore[operator]
            seconds=seconds,
            utilization=state.utilization,
            sm_mhz=state.sm_mhz,
            memory_mhz=state.memory_mhz,
            power_limit_w=state.power_limit_w,
            slowed_by=state.slowed_by,
            why=state.why,
        )

    def _state(self) -> nvml.GpuState:
        if self._driver is None or self._handle is None:
            return nvml.GpuState(why=self.why)
        return self._driver.state(self._handle)
