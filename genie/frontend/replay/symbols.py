"""Sizes that change from call to call: symbolic expressions compiled into one Python function."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import sympy  # type: ignore[import-untyped]
import torch
from torch.utils._sympy.printers import PythonPrinter

_printer = PythonPrinter()


class SymbolicLiteral(int):
    """An int of one call that depends on symbols: ``expr`` is its sympy expression."""

    expr: Any

    def __new__(cls, value: int, expr: Any) -> SymbolicLiteral:
        literal = super().__new__(cls, value)
        literal.expr = expr
        return literal


class UnboundSymbolError(Exception):
    """An expression holds a symbol that no argument of the graph determines (a data-dependent size)."""


def literal(value: Any) -> int:
    """A plain int, or a `SymbolicLiteral` for a `torch.SymInt` that is not constant."""
    if not isinstance(value, torch.SymInt):
        return int(value)
    expr = value.node.expr
    if expr.is_number:
        return int(expr)
    hint = value.node.hint
    if hint is None:
        raise UnboundSymbolError(str(expr))
    return SymbolicLiteral(int(hint), expr)


def evaluator(values: Sequence[int], symbols: Sequence[Any]) -> Callable[..., list[int]] | None:
    """A function of the symbols' values that returns ``values`` for them; None when all are constant.

    Raises UnboundSymbolError for an expression over other symbols.
    """
    if not any(isinstance(v, SymbolicLiteral) for v in values):
        return None
    names = {symbol: sympy.Symbol(f"s{i}", integer=True) for i, symbol in enumerate(symbols)}
    body: list[str] = []
    locals_: dict[Any, str] = {}
    items: list[str] = []
    for value in values:
        if not isinstance(value, SymbolicLiteral):
            items.append(str(int(value)))
            continue
        name = locals_.get(value.expr)
        if name is None:
            missing = value.expr.free_symbols - names.keys()
            if missing:
                raise UnboundSymbolError(", ".join(map(str, missing)))
            name = locals_[value.expr] = f"x{len(locals_)}"
            body.append(f" {name} = {_printer.doprint(value.expr.xreplace(names))}")
        items.append(name)
    source = f"def evaluate({', '.join(map(str, names.values()))}):\n" + "\n".join(body)
    source += f"\n return [{', '.join(items)}]"
    scope: dict[str, Any] = {"math": math, "torch": torch}
    exec(compile(source, "<genie sizes>", "exec"), scope)  # printed by sympy from checked expressions
    return scope["evaluate"]
