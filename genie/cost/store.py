"""Calibrations on disk: one JSON file for each kind of device, shared by all that look alike.

They lie in the folder ``cost`` of `genie.cache`.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import logging
import os
import re
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

from genie import cache
from genie.cost.model import FORMAT, DeviceModel
from genie.device_facts import DeviceFacts
from genie.errors import ConfigError

#: for another process's calibration: that of a GPU in three dtypes takes less
WAIT_S = 120.0
POLL_S = 0.1

logger = logging.getLogger(__name__)


def directory() -> Path:
    return cache.directory("cost")


def key_of(facts: DeviceFacts, memory_limit: int = 0) -> dict[str, Any]:
    """What must be equal for two devices to share a calibration. ``memory_limit``: of the server, in bytes,
    where it was too small for all measurements; 0 for a whole calibration."""
    key: dict[str, Any] = {
        "format": FORMAT,
        "type": facts.type,
        "model": facts.model,
        "cores": facts.cores,
        "torch": facts.torch,
        "host_cpu": facts.host_cpu,
        "driver": facts.driver,
    }
    if memory_limit:
        key["memory_limit"] = memory_limit
    return key


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
        raise _unwritable(path.parent, exc) from exc
    return path


def _unwritable(directory: Path, exc: OSError) -> ConfigError:
    return ConfigError(
        f"the calibration cannot be stored in {directory} ({exc.strerror}): name a directory that can "
        "be written in GENIE_CACHE_DIR"
    )


@contextmanager
def alone(key: dict[str, Any], timeout_s: float = WAIT_S) -> Iterator[bool]:
    """One process (of this host's, and of this directory's users) at a time: two calibrations on the same
    cores would measure each other. Waits for the other, and tells whether it ended: after ``timeout_s`` this
    one goes on nevertheless. The kernel frees the lock of a process that died. Raises ConfigError as `save`.
    """
    path = path_of(key).with_suffix(".lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a")
    except OSError as exc:
        raise _unwritable(path.parent, exc) from exc
    with file:
        yield _locked(file, timeout_s)


def _locked(file: IO[str], timeout_s: float) -> bool:
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except OSError as exc:
            if exc.errno not in (errno.EWOULDBLOCK, errno.EACCES):  # a file system without locks
                logger.warning("%s cannot be locked (%s): two calibrations may meet", file.name, exc.strerror)
                return False
        if time.monotonic() >= deadline:
            logger.warning(
                "another process has been measuring this device for %.0f s: measuring beside it", timeout_s
            )
            return False
        time.sleep(POLL_S)


def renamed(model: DeviceModel, device: str) -> DeviceModel:
    """The same measurements for another device that is alike."""
    return replace(model, device=device)
