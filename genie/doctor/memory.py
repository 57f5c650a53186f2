"""Main memory, shared memory and the folder for temporary files."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from genie.doctor import cgroups
from genie.doctor.findings import Finding, Request, ok, problem, warning
from genie.doctor.needs import GIB, device_count, host_bytes, profile_of

SHARED = Path("/dev/shm")
#: two object stores of the Ray baseline, 512 MiB each
RAY_STORES_BYTES = GIB
#: logs of servers and of Ray, and what pytest keeps
TEMPORARY_BYTES = GIB


def check_memory(request: Request) -> Iterator[Finding]:
    import psutil

    profile, devices = profile_of(request), device_count()
    available = psutil.virtual_memory().available
    limited = cgroups.memory_left()
    found = f"{available / GIB:.1f} GiB available"
    if limited is not None and limited < available:
        available, found = limited, f"{limited / GIB:.1f} GiB left in this control group"
    need = host_bytes(profile, devices)
    found += f"; profile {profile} on {devices} device(s) needs about {need / GIB:.1f} GiB"
    remedy = "stop other programs, use a smaller --genie-profile, or fewer baselines at a time"
    if available < need / 2:
        yield problem("memory", found, remedy)
    elif available < need:
        yield warning("memory", found, remedy)
    else:
        yield ok("memory", found)


def check_shared_memory(request: Request) -> Iterator[Finding]:
    yield shared_memory(SHARED)


def shared_memory(folder: Path) -> Finding:
    if not folder.is_dir():
        return problem("shared memory", f"{folder} does not exist", "mount a tmpfs there")
    free = shutil.disk_usage(folder).free
    found = f"{free / GIB:.2f} GiB free in {folder}; the Ray baseline needs {RAY_STORES_BYTES / GIB:.0f} GiB"
    if free < RAY_STORES_BYTES:
        return problem(
            "shared memory",
            found,
            "give the container more (docker --shm-size=2g), or leave out baseline ray",
        )
    return ok("shared memory", found)


def check_temporary(request: Request) -> Iterator[Finding]:
    yield temporary(Path(tempfile.gettempdir()))


def temporary(folder: Path) -> Finding:
    """Really writes there: a full disk, a quota and a read-only mount look alike from outside."""
    free = shutil.disk_usage(folder).free
    found = f"{free / GIB:.1f} GiB free in {folder}"
    remedy = "free some space, or set TMPDIR to a folder on another disk"
    try:
        with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
            file.write(bytes(1 << 20))
    except OSError as error:
        return problem("temporary files", f"{found}, but writing 1 MiB failed: {error.strerror}", remedy)
    return (
        ok("temporary files", found) if free >= TEMPORARY_BYTES else warning("temporary files", found, remedy)
    )
