"""Which Python line recorded an op: remembered as (code, instruction offset), told only in errors."""

from __future__ import annotations

import linecache
import os
from types import CodeType

import torch

_ROOTS = (os.path.dirname(torch.__file__) + os.sep, os.path.dirname(os.path.dirname(__file__)) + os.sep)
_INTERNAL: dict[CodeType, bool] = {}


def is_internal(code: CodeType) -> bool:
    """True for frames of torch and of Genie: a user's error points at the line above them."""
    known = _INTERNAL.get(code)
    if known is None:
        name = code.co_filename
        known = _INTERNAL[code] = name.startswith(_ROOTS[0]) or name.startswith(_ROOTS[1] + "frontend")
    return known


def describe(code: CodeType, offset: int) -> str:
    """``file:line in function: source text``."""
    line = code.co_firstlineno
    for start, end, number in code.co_lines():
        if start <= offset < end and number is not None:
            line = number
            break
    text = linecache.getline(code.co_filename, line).strip()
    return f"{code.co_filename}:{line} in {code.co_name}: {text}"
