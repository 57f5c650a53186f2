"""Generates the kernels through which ordinary calls are recorded.

What `Recorder.record` does for any call, a generated kernel does for one op, in straight-line code:
its argument kinds come from the op's schema, so there are no loops over arguments, no tests of what
cannot come, and a short key. It takes only calls that need nothing special, all others go to the
kernel that it stands in front of: a gradient is recorded, a tensor is not ours or has a host shadow,
an argument is a tensor where numbers are usual, the key is met for the first time.

The generated lines are in `linecache`, so tracebacks show them.
"""

from __future__ import annotations

import linecache
from collections.abc import Callable
from sys import _getframe
from time import perf_counter
from typing import Any

import torch

from genie.frontend.callsite import FROM_USER, user_frame
from genie.frontend.handle import Value
from genie.frontend.tensor import LazyTensor, make

#: an argument that was left out; PyTorch leaves out those at their default value
_ABSENT = object()
#: stands in a key for a float, whose value is no part of the instruction
_FLOAT = object()
_SCOPE = {
    "LazyTensor": LazyTensor, "Value": Value, "make": make, "grad_enabled": torch.is_grad_enabled,
    "getframe": _getframe, "FROM_USER": FROM_USER, "user_frame": user_frame, "clock": perf_counter,
    "ABSENT": _ABSENT, "FLOAT": _FLOAT,
}  # fmt: skip
_KINDS = {
    "Tensor": "tensor",
    "Optional[Tensor]": "optional",
    "List[Tensor]": "tensors",
    "List[int]": "ints",
    "Optional[List[int]]": "ints",
    "int": "plain",
    "Optional[int]": "plain",  # also dtypes and memory formats
    "bool": "plain",
    "str": "plain",
    "float": "float",
    "Optional[float]": "float",
    "number": "number",
    "Optional[number]": "number",
}
_kernels = 0


def count() -> int:
    """How many kernels there are: a recorder keeps one table of entries for each."""
    return _kernels


class _Source:
    """The source of one kernel, argument by argument."""

    def __init__(self) -> None:
        self.accept: list[str] = []  # conditions without which the call is not for this kernel
        self.keys: list[str] = []
        self.slots: list[str] = []  # lines that find each tensor's slot
        self.code: list[str] = []  # lines that append them
        self.floats: list[str] = []
        self.unfamiliar: list[str] = []  # lines before the lock
        self.has_ints = False

    def add(self, name: str, kind: str, may_be_number: bool, may_be_absent: bool) -> None:
        if kind == "tensor" and not may_be_number:
            self.accept.append(f"{name}.__class__ is LazyTensor")
            self.keys.append(f"{name}._spec")
            self._slot(name, "")
        elif kind in ("tensor", "optional"):
            self.unfamiliar += [
                f"{name}_class = {name}.__class__",
                f"if {name}_class is LazyTensor: {name}_key = {name}._spec",
            ]
            if kind == "optional":
                self.unfamiliar.append(f"elif {name} is None or {name} is ABSENT: {name}_key = {name}")
            else:
                self._number(name)
            self.unfamiliar.append("else: return GENERAL")
            self.keys.append(f"{name}_key")
            self._slot(name, f"if {name}_class is LazyTensor:")
        elif kind == "tensors":
            self.accept.append(f"{name}.__class__ is list")
            self.unfamiliar += [
                f"for x in {name}:",
                " if x.__class__ is not LazyTensor: return GENERAL",
            ]
            self.keys.append(f"*[x._spec for x in {name}]")
            self.slots += [f"{name}_slots = []", f"for x in {name}:", " h = x._h"]
            self.slots += [" " + line for line in self._lookup("s", "h")]
            self.slots += [f" {name}_slots.append(s)"]
            self.code.append(f"code += {name}_slots")
        elif kind == "number":
            self.unfamiliar += [
                f"{name}_class = {name}.__class__",
                f"if {name} is ABSENT: {name}_key = ABSENT",
            ]
            self._number(name)
            self.unfamiliar.append("else: return GENERAL")
            self.keys.append(f"{name}_key")
        elif kind == "ints":
            self.keys.append(f"tuple({name}) if {name}.__class__ is list else {name}")
            self.has_ints = True
        elif kind == "float":
            self.unfamiliar.append(f"{name}_key = FLOAT if {name}.__class__ is float else {name}")
            self.keys.append(f"{name}_key")
            self.floats.append(f"if {name}_key is FLOAT: recorder._floats.append({name})")
        else:
            self.keys.append(name)
            self.has_ints = True

    def _number(self, name: str) -> None:
        self.unfamiliar += [
            f"elif {name}_class is float: {name}_key = FLOAT",
            f"elif {name}_class is int: {name}_key = {name}",
        ]
        self.floats.append(f"if {name}_class is float: recorder._floats.append({name})")
        self.has_ints = True

    def _lookup(self, slot: str, handle: str) -> list[str]:
        """``handle``'s slot; one of another session is refused, one that is unrecorded gets recorded."""
        return [
            f"g = {handle}.gid",
            f"if {handle}.rec is recorder and g >= base: {slot} = g - base",
            f"else: {slot} = recorder.external_slot({handle})",
        ]

    def _slot(self, name: str, condition: str) -> None:
        indent = " " if condition else ""
        lines = [f"{name}_h = {name}._h", *self._lookup(f"{name}_slot", f"{name}_h")]
        self.slots += [condition] * bool(condition) + [indent + line for line in lines]
        append = f"code.append({name}_slot)"
        self.code.append(f"{condition} {append}" if condition else append)


def fast_kernel(
    op: Any,
    general: Callable[..., Any],
    *,
    is_view: bool = False,
    numbers_for_tensors: bool = False,
    refuse_flag: int | None = None,
) -> Callable[..., Any]:
    """``general`` with a generated kernel in front; ``general`` itself where the schema is unusual.

    ``numbers_for_tensors``: a Python number may stand at any tensor argument but the first.
    ``refuse_flag``: the position of an argument that, when true, makes a call one for ``general``.
    """
    global _kernels
    arguments, returns = op._schema.arguments, [str(r.type) for r in op._schema.returns]
    kinds = [_KINDS.get(str(a.type)) for a in arguments]
    several = returns == ["List[Tensor]"]
    if (
        None in kinds
        or kinds[0] not in ("tensor", "tensors")
        or (not several and returns != ["Tensor"])
        or any(a.kwarg_only and "Tensor" in str(a.type) for a in arguments)
    ):
        return general
    names = [a.name if a.kwarg_only else f"a{i}" for i, a in enumerate(arguments)]
    source = _Source()
    for i, (name, argument, kind) in enumerate(zip(names, arguments, kinds, strict=True)):
        source.add(name, kind or "", numbers_for_tensors and i > 0, argument.has_default_value())
    table = _kernels
    _kernels += 1
    parameters = []
    starred = False
    for name, argument in zip(names, arguments, strict=True):
        if argument.kwarg_only and not starred:
            parameters.append("*")
            starred = True
        parameters.append(f"{name}=ABSENT" if argument.has_default_value() else name)
    positional = "".join(f"{n}, " for n, a in zip(names, arguments, strict=True) if not a.kwarg_only)
    named = "".join(f"({a.name!r}, {a.name}), " for a in arguments if a.kwarg_only)
    given = f"given(({positional}), ({named}))"
    to_general = f"call_general({given})"
    first = "a0[0]" if kinds[0] == "tensors" else "a0"
    conditions = [*source.accept, "not grad_enabled()"]
    if kinds[0] == "tensors":
        conditions.append("a0")
    if refuse_flag is not None:
        conditions.append(f"not a{refuse_flag}")
    if is_view:
        conditions.append("not a0.requires_grad")
    one_key = len(source.keys) == 1 and not source.keys[0].startswith("*")
    key = source.keys[0] if one_key else f"({', '.join(source.keys)},)"
    body = [
        f"if not ({' and '.join(conditions)}): return GENERAL",
        *source.unfamiliar,
        f"first = {first}._h",
        "if first.shadow is not None: return GENERAL",
        "recorder = first.rec",
    ]
    if is_view:
        body += [
            "root = first.root",
            "if root is None: root = first.root = [False, True]",
            "elif root[0]: return GENERAL",
            "else: root[1] = True",
        ]
    body += [
        f"key = {key}",
        "with recorder.lock:",
        f" entry = recorder.tables[{table}].get(key)",
        " if entry is None:",
        f"  return recorder.record_first(OP, {given}, recorder.tables[{table}], key)",
        " base = recorder._base",
        *(" " + line for line in source.slots),
        " entries = recorder._entries",
        " if not entries: recorder._started = clock()",
        " entries.append(entry)",
        " sites = recorder._sites",
        " try: frame = getframe(1)",
        " except ValueError: frame = None",  # called by one of autograd's own threads
        " if frame is not None and not FROM_USER[frame.f_code.co_filename]: frame = user_frame(frame)",
        " if frame is None: sites += (None, -1)",
        " else:",
        "  sites.append(frame.f_code)",
        "  sites.append(frame.f_lasti)",
        " code = recorder._code",
        " code.append(entry.tid)",
        *(" " + line for line in source.code),
    ]
    if source.has_ints:
        body += [" if entry.literals: recorder._literals += entry.literals"]
    body += [" " + line for line in source.floats]
    body += [" made = recorder._made"]
    wrapping = [
        "h = Value()",
        "h.rec = recorder",
        "h.gid = base + len(made)",
        "h.shadow = None",
        f"h.root = {'root' if is_view else 'None'}",
        "made.append(h)",
        "out = make(*s.wrapper)",
        "out._h = h",
        "out._spec = s",
    ]
    if several:
        body += [" outs = []", " for s in entry.outs:"]
        body += ["  " + line for line in (*wrapping, "outs.append(out)")]
    else:
        body += [" s = entry.single"] + [" " + line for line in wrapping]
    body += [
        " if len(entries) >= recorder._chunk: recorder.flush()",
        f" return {'outs' if several else 'out'}",
    ]
    text = "\n".join(
        [f"def kernel({', '.join(parameters)}):"]
        + [" " + line.replace("return GENERAL", f"return {to_general}") for line in body]
    )
    filename = f"{__file__[:-3]}<{op.name()}>"
    linecache.cache[filename] = (len(text), None, text.splitlines(keepends=True), filename)

    def given_(args: tuple, kwargs: tuple) -> tuple[tuple, dict[str, Any]]:
        while args[-1] is _ABSENT:
            args = args[:-1]
        return args, {k: v for k, v in kwargs if v is not _ABSENT}

    def call_general(call: tuple[tuple, dict[str, Any]]) -> Any:
        return general(*call[0], **call[1])

    scope: dict[str, Any] = {**_SCOPE, "OP": op, "given": given_, "call_general": call_general}
    exec(compile(text, filename, "exec"), scope)
    return scope["kernel"]
