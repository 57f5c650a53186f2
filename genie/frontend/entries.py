"""Interned instructions: everything about an op call that does not change from call to call."""

from __future__ import annotations

import threading
from typing import Any

import torch

from genie.errors import UnsupportedOpError
from genie.frontend import arguments, rules
from genie.frontend.outputs import NeedsFunctionalForm, out_names
from genie.frontend.specs import Spec, meta_tensor, spec, spec_of, to_wire
from genie.wire.allowed_ops import check as check_allowed
from genie.wire.messages import OpDef, TensorSpec


class Entry:
    """One op with one set of input specs and int arguments.

    ``results`` describes the op's flattened outputs: a `Spec` for a new tensor, an int k for "the
    k-th tensor argument itself", None for an undefined tensor. ``container`` is None for a bare
    tensor, else the type that holds them (list or tuple). ``outs`` are the specs of new tensors.
    """

    __slots__ = (
        "checked", "container", "dynamic", "ins", "literals", "once", "op", "outs", "results", "single",
        "tid", "views", "writes",
    )  # fmt: skip

    def __init__(
        self, op: str, tid: int, literals: tuple[int, ...], results: list, container: Any, writes: bool
    ):
        self.op, self.tid, self.literals = op, tid, literals
        self.results, self.container = results, container
        self.outs: list[Spec] = [r for r in results if isinstance(r, Spec)]
        bare = container is None and len(self.outs) == 1 and not writes
        self.single: Spec | None = self.outs[0] if bare else None
        self.writes = writes
        self.views = False
        self.checked = False
        self.dynamic = False
        self.once = False  # a dynamic entry whose outputs, once told, stay as they are
        self.ins: tuple[Spec, ...] = ()  # of the tensor arguments, where the op was recorded

    def with_specs(self, specs: list[Spec]) -> Entry:
        """The same instruction with other predictions for its new tensors."""
        return self.with_sizes(self.literals, specs)

    def with_sizes(self, literals: tuple[int, ...], specs: list[Spec]) -> Entry:
        """The same op on tensors of other sizes."""
        entry = Entry(self.op, self.tid, literals, list(specs), self.container, self.writes)
        entry.views = self.views
        return entry

    def wire_specs(self) -> list[TensorSpec]:
        return [to_wire(s) for s in self.outs]

    def correct(self, output: int, stride: list[int]) -> None:
        """The device lays this output out otherwise than predicted: predict that from now on."""
        old = self.outs[output]
        new = spec(old.shape, tuple(stride), old.offset, old.dtype)
        self.outs[output] = new
        self.results = [new if r is old else r for r in self.results]
        if self.single is not None:
            self.single = new


class DataDependent(Exception):
    """The op's output shape depends on values: only the server can tell it."""


_DEFS: dict[tuple, int] = {}
_OPDEFS: list[OpDef] = []
_LOCK = threading.Lock()


def definition(tid: int) -> OpDef:
    """The op definition behind a number (numbers are unique in this process)."""
    return _OPDEFS[tid]


def define(op: str, args: list, kwargs: dict[str, list], outs: list[int]) -> int:
    key = (op, repr(args), repr(kwargs), tuple(outs))
    with _LOCK:
        tid = _DEFS.get(key)
        if tid is None:
            tid = _DEFS[key] = len(_OPDEFS)
            _OPDEFS.append(OpDef(tid, op, args, kwargs, outs))
    return tid


def op_name(func: torch._ops.OpOverload) -> str:
    """``aten::add.Tensor``; the default overload is spelled out."""
    name = func.name()
    return name if "." in name else name + ".default"


def make_entry(func: torch._ops.OpOverload, args: tuple, kwargs: dict[str, Any], tensors: list) -> Entry:
    """Infers the outputs of one call. Raises DataDependent, or the op's own error for bad arguments."""
    name = op_name(func)
    check_allowed(name)
    literals: list[int] = []
    arg_patterns = [arguments.pattern_of(a, literals, name) for a in args]
    kwarg_patterns = arguments.kwargs_pattern(kwargs, literals, name)
    writes = func._schema.is_mutable or writes_running_statistics(func._schema, args, kwargs)
    if rules.differs_between_devices(func, args, kwargs):
        raise DataDependent(f"what {name} returns differs between devices")
    ruled = rules.infer(func, args, kwargs)
    if ruled is not None:
        results: list = ruled if isinstance(ruled, list) else [ruled]
        container: Any = list if isinstance(ruled, list) else None
    else:
        results, container = _infer_on_meta(func, args, kwargs, tensors)
    outs = [-1 if isinstance(r, Spec) else -2 if r is None else r for r in results]
    tid = define(name, arg_patterns, kwarg_patterns, outs)
    entry = Entry(name, tid, tuple(literals), results, container, writes)
    entry.views = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
    entry.checked = ruled is not None and rules.is_certain(func, args)
    return entry


def writes_running_statistics(schema: Any, args: tuple, kwargs: dict[str, Any]) -> bool:
    """Normalisation ops write to their running statistics in training mode; their schemas do not say so."""
    names = [a.name for a in schema.arguments]
    if "running_mean" not in names:
        return False
    bound = dict(zip(names, args, strict=False)) | kwargs
    flags = [bound[n] for n in ("training", "train", "use_input_stats") if n in bound]
    return bound.get("running_mean") is not None and (not flags or bool(flags[0]))


def dynamic_entry(func: torch._ops.OpOverload, args: tuple, kwargs: dict[str, Any]) -> Entry:
    """An entry whose new outputs have unknown specs. Raises UnsupportedOpError for lists and views,
    NeedsFunctionalForm for ``out=``."""
    if out_names(func):
        raise NeedsFunctionalForm
    name = op_name(func)
    check_allowed(name)
    literals: list[int] = []
    arg_patterns = [arguments.pattern_of(a, literals, name) for a in args]
    kwarg_patterns = arguments.kwargs_pattern(kwargs, literals, name)
    outs: list[int] = []
    for r in func._schema.returns:
        if str(r.type) != "Tensor" or (r.alias_info is not None and not r.alias_info.is_write):
            raise UnsupportedOpError(
                f"{name} has outputs whose number or aliasing depends on values: "
                "move its inputs to the CPU with .cpu() first"
            )
        outs.append(0 if r.alias_info is not None else -1)
    if 0 in outs and not (args and isinstance(args[0], torch.Tensor)):
        raise UnsupportedOpError(
            f"{name} writes to an argument that is not its first: use its functional form"
        )
    tid = define(name, arg_patterns, kwarg_patterns, outs)
    results: list = [0 if o == 0 else None for o in outs]
    entry = Entry(
        name, tid, tuple(literals), results, tuple if len(outs) > 1 else None, func._schema.is_mutable
    )
    entry.dynamic = entry.checked = True
    entry.once = rules.differs_between_devices(func, args, kwargs)
    return entry


def learned_entry(asked: Entry, specs: list[Spec]) -> Entry:
    """What a dynamic entry becomes whose outputs do not depend on values, now that the server told."""
    container = asked.container
    return Entry(asked.op, asked.tid, asked.literals, list(specs), container, asked.writes)


_NEEDS_VALUES = (
    "data-dependent",
    "data dependent",
    "nonzero",
    "Cannot copy out of meta",
    "'Meta' backend",
    "item()",
    "a meta tensor without output_size",
)


def _infer_on_meta(func: torch._ops.OpOverload, args: tuple, kwargs: dict, tensors: list) -> tuple[list, Any]:
    metas = {id(t): (meta_tensor(t._spec), k) for k, t in reversed(list(enumerate(tensors)))}

    def to_meta(t: torch.Tensor) -> torch.Tensor:
        return metas[id(t)][0]

    margs = [_meta_device(arguments.map_tensors(a, to_meta)) for a in args]
    mkwargs = {
        k: _meta_device(arguments.map_tensors(v, to_meta))
        for k, v in kwargs.items()
        if k not in arguments.DROPPED_KWARGS
    }
    before = {k: (tuple(m.shape), m.stride()) for m, k in metas.values()}
    try:
        out = func(*margs, **mkwargs)
    except NotImplementedError as exc:
        raise DataDependent(str(exc)) from exc
    except RuntimeError as exc:
        if any(mark in str(exc) for mark in _NEEDS_VALUES):
            raise DataDependent(str(exc)) from exc
        raise
    for m, k in metas.values():
        if before[k] != (tuple(m.shape), m.stride()):
            if out_names(func):
                raise NeedsFunctionalForm
            raise UnsupportedOpError(
                f"{func.name()} resizes its argument {k}: give it a tensor of the final shape"
            )
    container = None if isinstance(out, torch.Tensor) or out is None else type(out)
    flat = [out] if container is None else out
    positions = {id(m): k for m, k in metas.values()}
    results: list = []
    for value in flat:
        if value is None:
            results.append(None)
        elif isinstance(value, torch.Tensor):
            known = positions.get(id(value))
            if known is None and (value.is_conj() or value.is_neg()):
                raise UnsupportedOpError(
                    f"{func.name()} makes a lazy conjugate or negative view: use resolve_conj()"
                )
            results.append(spec_of(value) if known is None else known)
        else:
            raise UnsupportedOpError(f"{func.name()} returns a {type(value).__name__}, which is no tensor")
    return results, container


def _meta_device(value: Any) -> Any:
    return torch.device("meta") if isinstance(value, torch.device) else value
