"""What the control groups of this process allow it: CPU quota and memory, of both cgroup versions.

Limits of all ancestors hold, so each is read from the process's own group up to the root of what is
mounted. Inside a container the path in ``/proc/self/cgroup`` may not be visible; the root then is the
container's own group.

Sources: the kernel's ``admin-guide/cgroup-v2.rst`` (``cpu.max``, ``memory.max``) and
``scheduler/sched-bwc.rst``, ``cgroup-v1/memory.rst``.
"""

from __future__ import annotations

from pathlib import Path, PurePosixPath

PROC = Path("/proc/self/cgroup")
ROOT = Path("/sys/fs/cgroup")


def cpu_quota(proc: Path = PROC, root: Path = ROOT) -> float | None:
    """CPU seconds per second that the process may use; None without a limit."""
    quotas = []
    for folder in _folders("cpu", proc, root):
        both = _words(folder / "cpu.max") or [
            *_words(folder / "cpu.cfs_quota_us"),
            *_words(folder / "cpu.cfs_period_us"),
        ]
        if len(both) == 2 and both[0] not in ("max", "-1"):
            quotas.append(int(both[0]) / int(both[1]))
    return min(quotas, default=None)


def memory_left(proc: Path = PROC, root: Path = ROOT) -> int | None:
    """Bytes until a memory limit, page cache that can be dropped counted as free; None without a limit."""
    left = []
    for folder in _folders("memory", proc, root):
        limit = _words(folder / "memory.max") or _words(folder / "memory.limit_in_bytes")
        used = _words(folder / "memory.current") or _words(folder / "memory.usage_in_bytes")
        # Version 1 says "no limit" by a number near 2**63.
        if limit and used and limit[0] != "max" and int(limit[0]) < 1 << 60:
            left.append(int(limit[0]) - int(used[0]) + _inactive_file(folder))
    return min(left, default=None)


def _folders(controller: str, proc: Path, root: Path) -> list[Path]:
    """Existing folders of the process's group and of its ancestors, for a controller."""
    found: list[Path] = []
    for line in proc.read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            base = root
        elif controller in controllers.split(","):
            base = root / controllers if (root / controllers).is_dir() else root / controller
        else:
            continue
        group = PurePosixPath(path.lstrip("/"))
        if ".." in group.parts:  # outside of this process's cgroup namespace
            group = PurePosixPath()
        found += [folder for folder in (base / group, *(base / p for p in group.parents)) if folder.is_dir()]
    return list(dict.fromkeys(found))


def _words(file: Path) -> list[str]:
    return file.read_text().split() if file.is_file() else []


def _inactive_file(folder: Path) -> int:
    words = _words(folder / "memory.stat")
    values = dict(zip(words[::2], words[1::2], strict=False))
    return int(values.get("total_inactive_file", values.get("inactive_file", 0)))
