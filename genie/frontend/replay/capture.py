"""Writes down, as a program's instructions, what a graph dispatches while it runs on fake tensors."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from genie.frontend import arguments, composites, dispatch, entries, rules
from genie.frontend.entries import Entry
from genie.frontend.replay.dynamo import fake_of
from genie.frontend.replay.symbols import literal
from genie.frontend.specs import Spec, spec
from genie.frontend.tensor import LazyTensor

aten = torch.ops.aten


class CannotLowerError(Exception):
    """The graph does something that only lazy capture does right; the message says what."""


@dataclass(frozen=True)
class Geometry:
    """Shape, strides and storage offset in elements; any of them may be a `SymbolicLiteral`."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype

    @classmethod
    def of(cls, t: Tensor) -> Geometry:
        return cls(
            tuple(map(literal, t.shape)),
            tuple(map(literal, t.stride())),
            literal(t.storage_offset()),
            t.dtype,
        )

    @property
    def sizes(self) -> tuple[int, ...]:
        return (*self.shape, *self.stride, self.offset)

    def spec(self, sizes: Sequence[int]) -> Spec:
        """The spec for ``sizes`` as `sizes` orders them."""
        rank = len(self.shape)
        return spec(tuple(sizes[:rank]), tuple(sizes[rank : 2 * rank]), sizes[2 * rank], self.dtype)


@dataclass(frozen=True)
class Output:
    """One value that the graph returns.

    ``kind`` "argument": the argument ``number`` itself. "slot": the program's value ``number``, or, when
    negative, its external -(number + 1); ``root`` is the slot or external whose memory it shares.
    "size": the int ``number``, which may be symbolic. "constant": None.
    """

    kind: str
    number: int = 0
    root: int = 0
    geometry: Geometry | None = None


#: how the server lays an output out where inference is wrong, as dimensions from the outermost in. The key
#: is (op, which of its occurrences, output): numbers of instructions change with the layouts.
Layouts = dict[tuple[str, int, int], tuple[int, ...]]


class Capture(TorchDispatchMode):
    """Writes down what is dispatched. Values are known by the identity of their fake tensors."""

    def __init__(self, mode: FakeTensorMode, layouts: Layouts) -> None:
        super().__init__()
        self._mode = mode
        self._layouts = layouts
        self._paused = False
        self._slots: dict[int, int] = {}
        self._alive: list[Tensor] = []  # so that no fake's id is used again
        self._roots: dict[int, int] = {}
        self._n_ext = 0
        self._occurrences: dict[str, int] = {}
        self.n_slots = 0
        self.code: list[int] = []
        self.literals: list[int] = []
        self.floats: list[float] = []
        self.entries: list[Entry] = []
        self.made: list[list[Geometry]] = []
        self.stacks: list[str] = []
        self.stack = ""
        self.constants: list[LazyTensor] = []
        self.attributes: list[LazyTensor] = []
        self._fakes: dict[int, FakeTensor] = {}
        self.mutated: set[int] = set()

    # -- values ----------------------------------------------------------------------------------

    def external(self, fake: FakeTensor) -> None:
        if fake.device.type != "genie":
            raise CannotLowerError(f"an argument is a tensor on {fake.device}")
        self._n_ext += 1
        self._bind(fake, -self._n_ext)

    def attribute(self, value: LazyTensor) -> FakeTensor:
        """A tensor that the graph holds: one external, however often the graph reads it."""
        fake = self._fakes.get(id(value))
        if fake is None:
            paused, self._paused = self._paused, True  # making the fake is no op of the program
            try:
                fake = self._fakes[id(value)] = fake_of(value, self._mode)
            finally:
                self._paused = paused
            self.attributes.append(value)
            self._n_ext += 1
            self._bind(fake, -self._n_ext)
        return fake

    def constant(self, value: LazyTensor) -> FakeTensor:
        self.constants.append(value)
        return self.attribute(value)

    def _bind(self, fake: Tensor, slot: int) -> None:
        self._slots[id(fake)] = slot
        self._alive.append(fake)

    def _slot(self, t: Tensor) -> int:
        slot = self._slots.get(id(t))
        if slot is None:
            raise CannotLowerError(
                "the graph uses a tensor on " + str(t.device)
                if t.device.type != "genie"
                else "the graph uses a tensor whose origin was not seen"
            )
        return slot

    def _root(self, slot: int) -> int:
        return self._roots.get(slot, slot)

    def output(self, value: Any, arguments_: Sequence[Any]) -> Output:
        if value is None:
            return Output("constant")
        if isinstance(value, (torch.SymInt, int)) and not isinstance(value, bool):
            return Output("size", literal(value))
        if not isinstance(value, Tensor):
            raise CannotLowerError(f"the graph returns a {type(value).__name__}")
        for index, argument in enumerate(arguments_):
            if argument is value:
                return Output("argument", index)
        slot = self._slot(value)
        return Output("slot", slot, self._root(slot), Geometry.of(value))

    def kept_layouts(self, returned: set[int]) -> list[tuple[int, list[int]]]:
        """For each dense value that is returned (or whose view is), and each whose layout depends on the
        kernel that its sizes choose."""
        layouts, slot = [], 0
        for entry, made in zip(self.entries, self.made, strict=True):
            for geometry in made:
                if self._root(slot) == slot and (slot in returned or entry.op in _LAID_OUT_BY_KERNELS):
                    order = sorted(range(len(geometry.shape)), key=lambda d: -geometry.stride[d])
                    if _is_dense(geometry, order):
                        layouts.append((slot, order))
                slot += 1
        return layouts

    # -- operations ------------------------------------------------------------------------------

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._paused or func.namespace == "prim":  # prim: a look at a fake's device
            return func(*args, **kwargs)
        if func in _SAME:
            return self._same(func, args, kwargs)
        if func in composites.KEPT:
            return self.composite(func, args, kwargs)
        if func.namespace != "aten":
            raise CannotLowerError(f"{func} is no ATen op")
        if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
            return func.decompose(*args, **kwargs)
        if func is aten._to_copy.default:
            return self._to_copy(func, args, kwargs)
        if func is aten.empty.memory_format:
            out = func(*args, **kwargs)
            geometry = (list(out.shape), list(out.stride()))
            made = {"dtype": out.dtype, "device": out.device}
            return self._instruction(aten.empty_strided.default, geometry, made, out)
        if func in dispatch.special_ops() and func is not aten.copy_.default:
            raise CannotLowerError(f"{func} is handled by lazy capture only")
        return self._instruction(func, args, kwargs, func(*args, **kwargs))

    def composite(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        """A composite op that the recorder keeps whole."""
        if composites.training(func, args):
            return func.decompose(*args, **kwargs)
        with self._pause():
            out = func.decompose(*args, **kwargs)
        return self._instruction(func, args, kwargs, out)

    @contextmanager
    def _pause(self) -> Any:
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before

    @property
    def paused(self) -> bool:
        return self._paused

    def _same(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        value = args[0]
        if isinstance(value, LazyTensor):
            # ``torch.tensor(..., device="genie")`` in the graph: made anew by every call, from a constant.
            source = self.constant(value)
            with self._pause():
                out = self._mode_call(aten.clone.default, (source,))
            return self._instruction(aten.clone.default, (source,), {}, out)
        out = func(*args, **kwargs)
        if isinstance(out, Tensor) and out is not value:
            self._bind(out, self._slot(value))
        return out

    def _mode_call(self, func: Any, args: tuple) -> Any:
        with self._mode:
            return func(*args)

    def _to_copy(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        device = kwargs.get("device")
        if device is not None and device.type != "genie":
            raise CannotLowerError(f"the graph copies a tensor to {device}")
        out = func(*args, **kwargs)
        kept = {k: v for k, v in kwargs.items() if k in ("dtype", "memory_format") and v is not None}
        return self._instruction(func, args[:1], kept, out)

    def _instruction(self, func: Any, args: tuple, kwargs: dict[str, Any], out: Any) -> Any:
        name = entries.op_name(func)
        kwargs = {k: v for k, v in kwargs.items() if v is not None and k not in _MEANINGLESS}
        tensors: list[Tensor] = []
        written: list[Tensor] = []
        by_name = {a.name: a for a in func._schema.arguments}
        statistics = _STATISTICS if entries.writes_running_statistics(func._schema, args, kwargs) else ()
        for schema, value in (
            *zip(func._schema.arguments, args, strict=False), *((by_name[k], v) for k, v in kwargs.items())
        ):  # fmt: skip
            if (schema.alias_info is not None and schema.alias_info.is_write) or schema.name in statistics:
                written += composites.tensors_in([value])
        args = tuple(self._plain(a, tensors) for a in args)
        kwargs = {k: self._plain(v, tensors) for k, v in kwargs.items()}
        literals: list[int] = []
        patterns = [arguments.pattern_of(a, literals, name) for a in args]
        kwarg_patterns = arguments.kwargs_pattern(kwargs, literals, name)
        slots = [self._slot(t) for t in tensors]
        occurrence = self._occurrences[name] = self._occurrences.get(name, -1) + 1
        container = None if isinstance(out, Tensor) or out is None else type(out)
        flat = [out] if container is None else list(out)
        outs: list[int] = []
        made: list[Geometry] = []
        results: list[Tensor | None] = []
        shares = _shared_argument(func)
        usual = _usual_order(func, args, tensors, out)
        for value in flat:
            if value is None:
                outs.append(-2)
                results.append(None)
                continue
            if not isinstance(value, FakeTensor):
                raise CannotLowerError(f"{func} returns a {type(value).__name__}")
            position = next((k for k, t in enumerate(tensors) if t is value), None)
            if position is not None:
                outs.append(position)
                results.append(value)
                continue
            outs.append(-1)
            value = self._laid_out(value, self._layouts.get((name, occurrence, len(made)), usual))
            self._bind(value, self.n_slots)
            if shares is not None:
                self._roots[self.n_slots] = self._root(slots[shares])
            self.n_slots += 1
            made.append(Geometry.of(value))
            results.append(value)
        for t in written:
            root = self._root(self._slot(t))
            if root < 0:
                self.mutated.add(-root - 1)
        tid = entries.define(name, patterns, kwarg_patterns, outs)
        self.code.append(tid)
        self.code += slots
        self.literals += literals
        self.floats += _floats((*args, *kwargs.values()))
        specs = [g.spec([int(n) for n in g.sizes]) for g in made]
        plain = tuple(int(x) for x in literals)
        entry = Entry(name, tid, plain, specs, container, func._schema.is_mutable)
        entry.views = shares == 0 and bool(made)
        self.entries.append(entry)
        self.made.append(made)
        self.stacks.append(self.stack)
        return results[0] if container is None else container(results)

    def _plain(self, value: Any, tensors: list[Tensor]) -> Any:
        """The argument with symbolic sizes as literals; its tensors are collected in order."""
        if isinstance(value, torch.SymInt):
            return literal(value)
        if isinstance(value, (torch.SymFloat, torch.SymBool)):
            raise CannotLowerError("a symbolic number other than a size is an argument")
        if isinstance(value, Tensor):
            tensors.append(value)
            return value
        if isinstance(value, torch.device) and value.type not in ("genie", "meta"):
            raise CannotLowerError(f"the graph makes a tensor on {value}")
        if isinstance(value, (list, tuple)):
            return [self._plain(v, tensors) for v in value]
        return value

    def _laid_out(self, value: FakeTensor, order: tuple[int, ...] | None) -> FakeTensor:
        """The fake as the server lays it out, where that is known to differ from the inferred strides."""
        if order is None:
            return value
        strides: list[Any] = [0] * value.dim()
        step: Any = 1
        for dim in reversed(order):
            strides[dim] = step
            step = step * value.shape[dim]
        with self._pause(), self._mode:
            fake = torch.empty_strided(tuple(value.shape), strides, dtype=value.dtype, device=value.device)
        assert isinstance(fake, FakeTensor)
        return fake


_LAID_OUT_BY_KERNELS = frozenset(
    f"aten::{name}"
    for name in (
        "scaled_dot_product_attention.default", "conv1d.default", "conv2d.default", "conv3d.default",
        "conv_transpose1d.default", "conv_transpose2d.input", "conv_transpose3d.input",
        "convolution.default", "lstm.input", "gru.input",
    )
)  # fmt: skip
#: normalisation ops write to these in training, though their schemas do not say so
_STATISTICS = frozenset({"running_mean", "running_var"})
_MEANINGLESS = frozenset({"pin_memory", "non_blocking", "layout"})
_SAME = frozenset({
    aten.detach.default, aten.alias.default, aten.lift.default, aten.lift_fresh.default, aten.detach_.default,
})  # fmt: skip


def _usual_order(func: Any, args: tuple, tensors: list[Tensor], out: Any) -> tuple[int, ...] | None:
    """How kernels lay the output out where shape inference says otherwise; the server tells where one
    does not."""
    if func is aten.scaled_dot_product_attention.default and out.dim() == 4:
        return (0, 2, 1, 3)
    transposed = func is aten.convolution.default and args[6]
    if func in rules.CONVOLUTIONS and not transposed:
        geometries = [Geometry.of(t) for t in tensors[:2]]
        if rules.is_laid_out_channels_last(*geometries):
            return (0, 2, 3, 1)
    return None


def _shared_argument(func: Any) -> int | None:
    """The tensor argument whose memory the new outputs share, if the schema says that they do."""
    returned = {
        name
        for r in func._schema.returns
        if r.alias_info is not None and not r.alias_info.is_write
        for name in (*r.alias_info.before_set, *r.alias_info.after_set)
    }
    if not returned and not any(r.alias_info is not None for r in func._schema.returns):
        return None
    position = 0
    for a in func._schema.arguments:
        if "Tensor" in str(a.type):
            if a.alias_info is not None:
                return position
            position += 1
    return None


def _is_dense(geometry: Geometry, order: list[int]) -> bool:
    step = 1
    for d in reversed(order):
        if geometry.shape[d] != 1 and geometry.stride[d] != step:
            return False
        step *= geometry.shape[d]
    return bool(geometry.shape) and geometry.offset == 0


def _floats(values: Sequence[Any]) -> list[float]:
    found: list[float] = []
    for v in values:
        if isinstance(v, float):
            found.append(v)
        elif isinstance(v, list):
            found += [x for x in v if isinstance(x, float)]
    return found
