"""NVIDIA's management library, asked so that no answer is ever an exception: it is None, with a reason.

A host has no driver, a driver tells a slice of a GPU less than a whole one, and a GPU can fall off the bus
between two questions. None of that may end a measurement.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import msgspec

#: NVML's clocks event reasons that slow a GPU down against its will; idle and the user's settings do not
SLOWED_BY = {0x4: "power cap", 0x8: "hardware slowdown", 0x20: "thermal (software)",
             0x40: "thermal (hardware)", 0x80: "power brake"}  # fmt: skip


class GpuState(msgspec.Struct, array_like=True, frozen=True):
    """A GPU at one moment, as its driver tells; None for what it does not tell.

    ``sm_mhz``, ``memory_mhz``: clocks now. ``power_limit_w``: in force. ``slowed_by``: see `SLOWED_BY`, empty
    when it runs freely. ``energy_mj``: since the driver was loaded. ``utilization``: percent of the driver's
    last sampling period (up to a second) in which a kernel ran. ``why``: the first refusal, "" for none.
    """

    name: str | None = None
    uuid: str | None = None
    driver: str | None = None
    sm_mhz: int | None = None
    max_sm_mhz: int | None = None
    memory_mhz: int | None = None
    max_memory_mhz: int | None = None
    power_limit_w: float | None = None
    slowed_by: list[str] | None = None
    utilization: int | None = None
    energy_mj: int | None = None
    why: str = ""


class Driver:
    """The loaded library. Every question to it may be refused."""

    def __init__(self, library: Any) -> None:
        self._library = library
        self.why = ""  # the first refusal since `state` began

    def version(self) -> str | None:
        return _text(self._asked(self._library.nvmlSystemGetDriverVersion))

    def count(self) -> int:
        return self._asked(self._library.nvmlDeviceGetCount) or 0

    def by_index(self, index: int) -> Any | None:
        """A handle for `state`, by the driver's own numbers."""
        return self._asked(self._library.nvmlDeviceGetHandleByIndex, index)

    def by_uuid(self, uuid: str) -> Any | None:
        """Of a GPU, or of a slice of one, by torch's uuid: CUDA_VISIBLE_DEVICES renumbers torch's devices,
        but not the driver's."""
        self.why = ""
        for prefix in ("GPU-", "MIG-"):
            handle = self._asked(self._library.nvmlDeviceGetHandleByUUID, f"{prefix}{uuid}".encode())
            if handle is not None:
                return handle
        return None

    def state(self, handle: Any) -> GpuState:
        nvml, asked = self._library, self._asked
        self.why = ""
        reasons = asked(nvml.nvmlDeviceGetCurrentClocksThrottleReasons, handle)
        rates = asked(nvml.nvmlDeviceGetUtilizationRates, handle)
        limit_mw = asked(nvml.nvmlDeviceGetEnforcedPowerLimit, handle)
        return GpuState(
            name=_text(asked(nvml.nvmlDeviceGetName, handle)),
            uuid=_text(asked(nvml.nvmlDeviceGetUUID, handle)),
            driver=self.version(),
            sm_mhz=asked(nvml.nvmlDeviceGetClockInfo, handle, nvml.NVML_CLOCK_SM),
            max_sm_mhz=asked(nvml.nvmlDeviceGetMaxClockInfo, handle, nvml.NVML_CLOCK_SM),
            memory_mhz=asked(nvml.nvmlDeviceGetClockInfo, handle, nvml.NVML_CLOCK_MEM),
            max_memory_mhz=asked(nvml.nvmlDeviceGetMaxClockInfo, handle, nvml.NVML_CLOCK_MEM),
            power_limit_w=None if limit_mw is None else limit_mw / 1e3,
            slowed_by=None if reasons is None else [told for bit, told in SLOWED_BY.items() if reasons & bit],
            utilization=None if rates is None else int(rates.gpu),
            energy_mj=asked(nvml.nvmlDeviceGetTotalEnergyConsumption, handle),
            why=self.why,
        )

    def _asked(self, question: Callable[..., Any], *about: Any) -> Any | None:
        try:
            return question(*about)
        except self._library.NVMLError as error:
            name = getattr(question, "__name__", "NVML")
            self.why = self.why or f"{name}: {error}"
            return None


def load() -> tuple[Driver | None, str]:
    """The driver's library, initialised once more (it counts), or None and one line of why."""
    try:
        import pynvml
    except ImportError as error:
        return None, f"no NVML: {error} (pip install nvidia-ml-py)"
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        return None, f"no NVML: {error}"
    return Driver(pynvml), ""


def release() -> None:
    """Ends one successful `load`."""
    import pynvml

    try:
        pynvml.nvmlShutdown()
    except pynvml.NVMLError:
        return  # the driver is gone, and all that it counted with it


@contextmanager
def loaded() -> Iterator[tuple[Driver | None, str]]:
    """`load`, then `release`."""
    driver, why = load()
    try:
        yield driver, why
    finally:
        if driver is not None:
            release()


def _text(value: str | bytes | None) -> str | None:
    return value.decode() if isinstance(value, bytes) else value
