"""Models of the devices behind a pool's servers: from the cache, or measured through a session.

Servers whose devices are alike (see `genie.cost.store.key_of`) share one calibration, which is measured
on the first of them while the others idle. A server whose memory limit is too small for all measurements
has a calibration of its own, of the smaller ones.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch

from genie.cost import measure, store
from genie.cost.fit import Sample, fit
from genie.cost.judge import Judgement, Row, judge
from genie.cost.model import DeviceModel
from genie.cost.programs import Probe, microbenchmark_probes, probes
from genie.cost.sizing import sizing
from genie.errors import GenieError
from genie.runtime.link import ServerLink
from genie.runtime.remote import open_link

#: dtypes that are measured on each type of device; others are scaled from these
DTYPES: dict[str, tuple[torch.dtype, ...]] = {
    "cpu": (torch.float32,),
    "cuda": (torch.float32, torch.float16, torch.bfloat16),
}
#: what tokens, images and elements are multiplied with: a GPU is not busy with what a core is
_SCALE = {"cpu": 1, "cuda": 8}

logger = logging.getLogger(__name__)

Progress = Callable[[str, int, int], None]


def load_or_calibrate(
    addresses: Sequence[str],
    token: str | None = None,
    *,
    tls_ca: str | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> list[DeviceModel]:
    """One model for each server, in order. ``force`` measures even what is stored. ``progress`` is called
    with the device and how many of how many measurements are done.

    Raises ConnectError, AuthError, ConfigError (the cache cannot be used), and what a session raises.
    """
    models: dict[str, DeviceModel] = {}
    found = []
    for address in addresses:
        link = open_link(address, token, tls_ca=tls_ca)
        try:
            welcome = link.connection.welcome
            name = f"{store.path_of(store.key_of(welcome.facts))} {welcome.memory_limit}"
            if name not in models:
                models[name] = _load_or_calibrate(link, force, progress)
            found.append(store.renamed(models[name], welcome.device))
        finally:
            link.close()
    return found


def _load_or_calibrate(link: ServerLink, force: bool, progress: Progress | None) -> DeviceModel:
    welcome = link.connection.welcome
    keys = [store.key_of(welcome.facts)]
    if welcome.memory_limit:
        keys.append(store.key_of(welcome.facts, welcome.memory_limit))
    if not force and (model := _stored(keys)) is not None:
        return model
    with store.alone(keys[0]):
        # Another process may have measured it while this one waited.
        model = None if force else _stored(keys)
        if model is None:
            model = calibrate(link, progress=progress)
            store.save(model)
    return model


def _stored(keys: Sequence[dict[str, Any]]) -> DeviceModel | None:
    return next((model for key in keys if (model := store.load(key)) is not None), None)


def calibrate(
    link: ServerLink, *, chosen: Sequence[Probe] | None = None, progress: Progress | None = None
) -> DeviceModel:
    """Measures the device behind ``link``, which is closed by it. ``chosen`` are the probes (default: those
    of the microbenchmark and of real layers). Stores nothing. Raises GenieError where nothing was measured.

    Where the server's memory limit is too small for them all, the largest are left out: a warning says so,
    ``measured`` names them, and the limit is in the model's key.
    """
    welcome = link.connection.welcome
    kind = welcome.device_type
    every = list(chosen) if chosen is not None else default_probes(kind)
    dtypes = DTYPES[kind]
    executor = measure.remote(link)
    total, count = len(every) * measure.ROUNDS * len(dtypes), 0

    def done() -> None:
        nonlocal count
        count += 1
        if progress is not None:
            progress(welcome.device, count, total)

    limit = welcome.memory_limit
    sized = {d: sizing(every, kind, d.itemsize, limit) for d in dtypes}
    limited = any(s.limited for s in sized.values())
    left_out = list(dict.fromkeys(p.label for s in sized.values() for p in every if p not in s.probes))
    if limited:
        logger.warning(
            "%s lets a session hold %.1f MB, too little for a whole calibration: %d of %d ops are not "
            "measured, larger ones are predicted as the largest that are; start it with a --memory-limit of "
            "%.0f MB or more",
            welcome.device, limit / 1e6, len(left_out), len(every),
            max(sizing(every, kind, d.itemsize).needed_bytes(d.itemsize) for d in dtypes) / 1e6 + 1,
        )  # fmt: skip
    samples = measure.measure(executor, kind, dtypes, every, done=done)
    try:
        model = fit(welcome.device, samples)
    except ValueError as exc:
        remedy = f": start it with a larger --memory-limit than {limit} bytes" if limited else ""
        raise GenieError(f"{welcome.device} could not be calibrated: {exc}{remedy}") from exc
    model.key = store.key_of(welcome.facts, limit if limited else 0)
    model.measured = {name: _told(model, [s for s in samples if s.dtype == name]) for name in model.groups}
    if limited:
        for told in model.measured.values():
            told["memory_limit"], told["left_out"] = limit, left_out
    return model


def default_probes(device_type: str) -> list[Probe]:
    """The microbenchmark's cases at the sizes for this type of device, and real layers' sizes."""
    from genie.workloads.microbenchmark import Microbenchmark
    from genie.workloads.profiles import get_profile

    profile = "gpu" if device_type == "cuda" else "cpu"
    cases = Microbenchmark(profile, get_profile(profile).microbenchmark).op_cases
    return [*microbenchmark_probes(cases), *probes(_SCALE[device_type])]


def _told(model: DeviceModel, samples: Sequence[Sample]) -> dict[str, Any]:
    """For people and reports: how far predictions are from held-out measurements, and from the fitted."""
    told: dict[str, Any] = {"samples": len(samples)}
    for name, chosen in (
        ("held_out", [s for s in samples if s.held_out]),
        ("fitted", [s for s in samples if not s.held_out]),
    ):
        if chosen:
            told[name] = as_json(judge(model, chosen))
    return told


def as_json(judgement: Judgement) -> dict[str, Any]:
    def row(r: Row) -> list[Any]:
        return [r.label, r.family, r.measured_s, r.predicted_s]

    return {
        "mape": judgement.mape,
        "spearman": judgement.spearman,
        "by_family": judgement.by_family,
        "rows": [row(r) for r in judgement.rows],
    }
