"""Clocks: the one that the CPU runs at, and the one that time is read from."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from genie.doctor.findings import Finding, Request, not_applicable, ok, warning

SYS = Path("/sys/devices/system")
#: read without leaving the process, in tens of nanoseconds
QUICK_SOURCES = ("tsc", "kvm-clock", "hyperv_clocksource_tsc_page", "arch_sys_counter", "riscv_clocksource")
#: the fastest request of the suite, an empty round trip, takes tens of microseconds
RESOLUTION_S = 1e-6


def check_frequency(request: Request) -> Iterator[Finding]:
    yield governors(SYS / "cpu", sorted(os.sched_getaffinity(0)))


def governors(folder: Path, cores: list[int]) -> Finding:
    files = [folder / f"cpu{core}/cpufreq/scaling_governor" for core in cores]
    found = Counter(file.read_text().strip() for file in files if file.is_file())
    if not found:
        return not_applicable("CPU frequency", "the kernel shows no cpufreq (usual in a virtual machine)")
    text = ", ".join(f"{name} on {count} cores" for name, count in found.items())
    if set(found) == {"performance"}:
        return ok("CPU frequency", f"governor {text}")
    return warning(
        "CPU frequency",
        f"governor {text}: the clock follows the load",
        "sudo cpupower frequency-set --governor performance",
    )


def check_clock(request: Request) -> Iterator[Finding]:
    yield clock_source(SYS / "clocksource/clocksource0/current_clocksource")
    step = _smallest_step()
    found = f"perf_counter advances in steps of {step * 1e9:.0f} ns"
    if step > RESOLUTION_S:
        yield warning(
            "clock resolution", found, "use another clock source or machine: short requests are lost"
        )
    else:
        yield ok("clock resolution", found)


def clock_source(file: Path) -> Finding:
    if not file.is_file():
        return not_applicable("clock source", "the kernel does not tell")
    source = file.read_text().strip()
    if source in QUICK_SOURCES:
        return ok("clock source", source)
    return warning(
        "clock source",
        f"{source}: reading the time is a slow system call",
        "boot with clocksource=tsc if the CPU's TSC is stable, or use another machine",
    )


def _smallest_step() -> float:
    """Seconds between two different readings, the least of a thousand."""
    least = float("inf")
    for _ in range(1000):
        start = now = time.perf_counter()
        while now == start:
            now = time.perf_counter()
        least = min(least, now - start)
    return least
