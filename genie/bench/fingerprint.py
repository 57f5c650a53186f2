"""What has to be the same for two results to be compared: hosts, devices, libraries, profile, weights.

Every cell stores one (``extra_info["fingerprint"]``), plain JSON:

    client   {cpu_model, cores, machine, python, libraries}         the host that measures
    devices  [{type, model, cores, torch, driver, max_sm_mhz}, ...]  what the cell may use: one for a
             local baseline, the whole pool for a remote one; told by the servers themselves where
             they were not started by the run

Host names, kernels' builds and this project's own version are not part of it: they may change
between two results that are comparable.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from genie.bench.results import CellResult

#: keys of ``extra_info`` beside the fingerprint that decide whether two results are of the same work
SAME_WORK = ("workload", "profile", "params", "weights", "model")


def differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Readable differences between two fingerprints, ``key: this, not that``; empty when they agree."""
    mine, theirs = dict(_flat(one)), dict(_flat(other))
    return [
        f"{key}: {_told(mine.get(key))}, not {_told(theirs.get(key))}"
        for key in dict.fromkeys([*mine, *theirs])
        if mine.get(key) != theirs.get(key)
    ]


def cell_differences(one: CellResult, other: CellResult) -> list[str]:
    """Why two results of one cell may not be compared; empty when they may."""
    return differences(
        {key: one.info.get(key) for key in (*SAME_WORK, "fingerprint")},
        {key: other.info.get(key) for key in (*SAME_WORK, "fingerprint")},
    )


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from _flat(inner, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list) and any(isinstance(inner, Mapping) for inner in value):
        yield f"{name} (count)", len(value)
        for index, inner in enumerate(value):
            yield from _flat(inner, f"{name}[{index}]")
    else:
        yield name, value


def _told(value: Any) -> str:
    return "nothing" if value is None else str(value)
