"""What has to be the same for two results to be compared: hosts, devices, libraries, profile, weights.

Every cell stores one (``extra_info["fingerprint"]``), plain JSON:

    client   {cpu_model, cores, machine, python, libraries}         the host that measures
    gpus     [{name, uuid, driver, sm_mhz, memory_mhz, power_limit_w, slowed_by, ...}, ...]   of this host,
             as they were when the cell began; None without any, and ``gpus_why`` says why
    devices  [{type, model, cores, torch, host_cpu, driver, max_sm_mhz}, ...]   what the cell may use:
             one for a local baseline, the whole pool for a remote one; told by the servers
             themselves where they were not started by the run

``gpus`` is told and never compared: clocks and temperatures are not the same twice. Host names, kernels'
builds and this project's own version are not part of it: they may change
between two results that are comparable.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from string import hexdigits
from typing import TYPE_CHECKING, Any

import msgspec

from genie.bench.machine import host_facts
from genie.device_facts import gpus

if TYPE_CHECKING:
    from genie.bench.results import CellResult
    from genie.device_facts import DeviceFacts

#: keys of ``extra_info`` beside the fingerprint that decide whether two results are of the same work
SAME_WORK = ("workload", "profile", "params", "weights", "model", "ablated")
#: keys of the fingerprint that are for people: they may differ between results that are comparable
VARYING = ("gpus", "gpus_why")
COUNT = " (count)"
SHA256_DIGITS = 64


def fingerprint(devices: Sequence[DeviceFacts]) -> dict[str, Any]:
    """Of a cell that is measured on this host and may use ``devices``."""
    found, why = gpus() if any(device.type == "cuda" for device in devices) else (None, "no GPU is used")
    return {
        "client": host_facts(),
        "devices": [msgspec.structs.asdict(device) for device in devices],
        "gpus": found,
        "gpus_why": why or None,
    }


def differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Readable differences between two fingerprints, ``key: this, not that``; empty when they agree."""
    mine, theirs = dict(_flat(one)), dict(_flat(other))
    differing = [key for key in dict.fromkeys([*mine, *theirs]) if mine.get(key) != theirs.get(key)]
    # Where there are more devices on one side, their facts say nothing more.
    counts = tuple(f"{key.removesuffix(COUNT)}[" for key in differing if key.endswith(COUNT))
    return [
        f"{key}: {_told(mine.get(key))}, not {_told(theirs.get(key))}"
        for key in differing
        if not (counts and key.startswith(counts))
    ]


def cell_differences(one: CellResult, other: CellResult) -> list[str]:
    """Why two results of one cell may not be compared; empty when they may."""
    keys: tuple[str, ...] = SAME_WORK
    if one.profile != other.profile:
        keys = ("workload", "profile")  # other models and parameters follow from it
    return differences(_of(one, (*keys, "fingerprint")), _of(other, (*keys, "fingerprint")))


def neighbour_differences(one: CellResult, other: CellResult) -> list[str]:
    """Why two rows of one table may not stand side by side; their baselines, so their devices, may differ."""
    keys = ("workload", "profile", "params", "weights") if one.profile == other.profile else ("profile",)
    return differences(
        _of(one, keys) | {"client": one.info["fingerprint"].get("client")},
        _of(other, keys) | {"client": other.info["fingerprint"].get("client")},
    )


def _of(cell: CellResult, keys: Sequence[str]) -> dict[str, Any]:
    found = {key: cell.info.get(key) for key in keys}
    if "fingerprint" in found:
        stored = found["fingerprint"] or {}
        found["fingerprint"] = {key: value for key, value in stored.items() if key not in VARYING}
    return found


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _flat(inner, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list) and any(isinstance(inner, Mapping) for inner in value):
        yield f"{name}{COUNT}", len(value)
        for index, inner in enumerate(value):
            yield from _flat(inner, f"{name}[{index}]")
    else:
        yield name, value


def _told(value: Any) -> str:
    if value is None:
        return "nothing"
    text = str(value)
    return f"{text[:12]}..." if len(text) == SHA256_DIGITS and set(text) <= set(hexdigits) else text
