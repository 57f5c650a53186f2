"""The page on disk: whole or not at all."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from genie.errors import ConfigError


def write_page(path: Path, page: str) -> None:
    """Replaces ``path`` by ``page`` in one step: at no moment is it half written.

    Raises ConfigError that names the remedy; what stood at ``path`` is then untouched. A device or a
    pipe cannot be replaced and is written to.
    """
    content = page.encode()
    try:
        if path.exists() and not path.is_file() and not path.is_dir():
            with path.open("wb", buffering=0) as file:
                _write_all(file.fileno(), content)
            return
        _replace(Path(os.path.realpath(path)), content)  # a link keeps pointing where it did
    except OSError as error:
        raise ConfigError(
            f"cannot write {path}: {error.strerror}: free some space there, or give a path to -o that "
            "you may write to"
        ) from None


def _replace(target: Path, content: bytes) -> None:
    beside = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        try:
            _write_all(descriptor, content)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.replace(beside, target)
    except BaseException:
        with suppress(FileNotFoundError):
            beside.unlink()
        raise


def _write_all(descriptor: int, content: bytes) -> None:
    left = memoryview(content)
    while left:
        left = left[os.write(descriptor, left) :]
