"""Cores: whether processes can be pinned to them, may use all of them, and have them to themselves."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from typing import Any

from genie.doctor import cgroups
from genie.doctor.findings import Finding, Request, not_applicable, ok, problem, warning

LOOK_S = 0.5
#: cores that others may use before it is worth a warning, and a process's share to be named
BUSY_CORES = 0.15
NAMED_SHARE = 0.05
#: share of the machine's time that the hypervisor gave to others
STOLEN = 0.01


def check_pinning(request: Request) -> Iterator[Finding]:
    """Pins this thread to each of its cores in turn, and back."""
    allowed = os.sched_getaffinity(0)
    try:
        for core in sorted(allowed):
            os.sched_setaffinity(0, {core})
    except OSError as error:
        yield problem(
            "pinning",
            f"cannot pin to a core: {error.strerror}",
            "let the container call sched_setaffinity (seccomp profile): every device is a set of cores",
        )
    else:
        yield ok("pinning", f"processes can be pinned to each of {len(allowed)} cores")
    finally:
        os.sched_setaffinity(0, allowed)


def check_quota(request: Request) -> Iterator[Finding]:
    yield quota(cgroups.cpu_quota(), len(os.sched_getaffinity(0)))


def quota(limit: float | None, cores: int) -> Finding:
    if limit is None:
        return ok("CPU quota", "none")
    found = f"{limit:.2f} CPUs, of {cores} visible cores"
    if limit < cores:
        return warning(
            "CPU quota",
            found,
            "the kernel stops all processes for a while when it is used up, and figures jump: give whole "
            "cores instead (docker --cpuset-cpus, a Kubernetes static CPU policy)",
        )
    return ok("CPU quota", found)


def check_free_cores(request: Request) -> Iterator[Finding]:
    """What others used while this process slept."""
    import psutil

    before, machine = _seconds(psutil), psutil.cpu_times()
    started = time.monotonic()
    time.sleep(LOOK_S)
    spent = time.monotonic() - started
    after, now = _seconds(psutil), psutil.cpu_times()
    busy = sum(getattr(now, kind) - getattr(machine, kind) for kind in ("user", "nice", "system")) / spent
    shares = {who: (seconds - before[who]) / spent for who, seconds in after.items() if who in before}
    named = sorted((who for who in shares if shares[who] >= NAMED_SHARE), key=lambda who: -shares[who])
    load = " ".join(f"{value:.2f}" for value in os.getloadavg())
    found = f"others use {busy:.2f} of {psutil.cpu_count()} cores (load average {load})"
    if busy >= BUSY_CORES:
        names = ", ".join(f"{name} (pid {pid}) {shares[pid, name]:.0%}" for pid, name in named[:5])
        yield warning(
            "free cores",
            f"{found}: {names or 'by processes that cannot be seen from here'}",
            "stop them before you measure, or keep them off with taskset; do not run two suites at once",
        )
    else:
        yield ok("free cores", found)
    yield _stolen(machine, now)


def _seconds(psutil: Any) -> dict[tuple[int, str], float]:
    """CPU seconds so far of every other process, by pid and name."""
    found = {}
    for process in psutil.process_iter():
        try:
            times = process.cpu_times()
            if process.pid != os.getpid():
                found[process.pid, process.name()] = times.user + times.system
        except psutil.Error:  # it has ended, or is another user's
            continue
    return found


def _stolen(before: Any, after: Any) -> Finding:
    if not hasattr(after, "steal"):
        return not_applicable("steal time", "the kernel does not count it")
    total = sum(after) - sum(before)
    share = (after.steal - before.steal) / total if total > 0 else 0.0
    found = f"the hypervisor gave {share:.1%} of this machine's time to others"
    if share > STOLEN:
        return warning("steal time", found, "use a machine with dedicated cores, or repeat at a quieter time")
    return ok("steal time", found)
