"""Which Python line recorded an op: remembered as (code, instruction offset), told only in errors."""

from __future__ import annotations

import linecache
import os
from types import CodeType, FrameType
from typing import Any

import torch

_ROOTS = (
    os.path.dirname(torch.__file__) + os.sep,
    os.path.join(os.path.dirname(os.path.dirname(__file__)), "frontend"),
)


class _FromUser(dict[str, bool]):
    """Is this file the user's? By file name: a code object's hash is a hash of all that it contains."""

    def __missing__(self, filename: str) -> bool:
        found = self[filename] = not filename.startswith(_ROOTS)
        return found


FROM_USER = _FromUser()


def user_frame(frame: FrameType | None) -> FrameType | None:
    """The first frame from here outwards that is neither PyTorch's nor Genie's."""
    while frame is not None and not FROM_USER[frame.f_code.co_filename]:
        frame = frame.f_back
    return frame


def describe(code: CodeType, offset: int) -> str:
    """``file:line in function: source text``."""
    line = code.co_firstlineno
    for start, end, number in code.co_lines():
        if start <= offset < end and number is not None:
            line = number
            break
    text = linecache.getline(code.co_filename, line).strip()
    return f"{code.co_filename}:{line} in {code.co_name}: {text}"


class Sites:
    """The call sites of one program's instructions, in order.

    ``flat`` holds a code object (or None where no line is the user's) and an offset in it for each.
    """

    __slots__ = ("_flat",)

    def __init__(self, flat: list[Any]) -> None:
        self._flat = flat

    def describe(self, instruction: int) -> str | None:
        """The site of an instruction, or None where it was recorded by no Python line of the user's."""
        code = self._flat[2 * instruction]
        return describe(code, self._flat[2 * instruction + 1]) if code is not None else None
