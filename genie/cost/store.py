"""Calibrations on disk: one JSON file for each kind of device, shared by all that look alike.

They lie in ``$GENIE_CACHE_DIR/cost``, else in ``$XDG_CACHE_HOME/genie/cost``, else in
``~/.cache/genie/cost``.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from genie.cost.model import FORMAT, DeviceModel
from genie.device_facts import DeviceFacts
from genie.errors import ConfigError

logger = logging.getLogger(__name__)


def directory() -> Path:
    own = os.environ.get("GENIE_CACHE_DIR")
    if own:
        return Path(own).expanduser() / "cost"
    base = os.environ.get("XDG_CACHE_HOME")
    # The specification of XDG says to ignore a relative one.
    home = Path(base) if base and Path(base).is_absolute() else Path.home() / ".cache"
    return home / "genie" / "cost"


def key_of(facts: DeviceFacts) -> dict[str, Any]:
    """What must be equal for two devices to share a calibration."""
    return {
        "format": FORMAT,
        "type": facts.type,
        "model": facts.model,
        "cores": facts.cores,
        "torch": facts.torch,
        "host_cpu": facts.host_cpu,
        "driver": facts.driver,
    }


def path_of(key: dict[str, Any]) -> Path:
    digest = hashlib.sha256(repr(sorted(key.items())).encode()).hexdigest()[:12]
    name = re.sub(r"[^A-Za-z0-9]+", "-", f"{key['model']} x{key['cores']} torch {key['torch']}").strip("-")
    return directory() / f"{name}-{digest}.json"


def load(key: dict[str, Any]) -> DeviceModel | None:
    """None where there is none yet. A file that is damaged, or of another device, counts as none, and is
    named in a warning: the next `save` replaces it. Raises ConfigError for one that may not be read."""
    path = path_of(key)
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as exc:
        raise ConfigError(
            f"the calibration {path} cannot be read ({exc.strerror}): correct its permissions, or name "
            "another directory in GENIE_CACHE_DIR"
        ) from exc
    try:
        model = DeviceModel.from_json(data)
    except ValueError as exc:
        logger.warning("the calibration %s is damaged (%s): the device is measured anew", path, exc)
        return None
    if model.key != key:
        logger.warning("the calibration %s is that of another device: this one is measured anew", path)
        return None
    return model


def save(model: DeviceModel) -> Path:
    """Readers see the old file or the new one, never a part; of several writers one wins. Raises
    ConfigError where nothing can be written."""
    path = path_of(model.key)
    temporary = ""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".part", delete=False) as file:
            temporary = file.name
            file.write(model.to_json())
        os.replace(temporary, path)
    except OSError as exc:
        if temporary:
            Path(temporary).unlink(missing_ok=True)
        raise ConfigError(
            f"the calibration cannot be stored in {path.parent} ({exc.strerror}): name a directory that can "
            "be written in GENIE_CACHE_DIR"
        ) from exc
    return path


def renamed(model: DeviceModel, device: str) -> DeviceModel:
    """The same measurements for another device that is alike."""
    return replace(model, device=device)
