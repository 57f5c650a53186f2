"""What conforming means: one op, one sample, on the CPU and on device ``genie``, compared."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch.testing._internal.opinfo.core import BinaryUfuncInfo, UnaryUfuncInfo

from tests.conformance.cases import SEED, dtypes_of, samples_of, seed_cpu, tensors_in
from tests.conformance.comparison import DEVICE, Differs, ValuesDiffer, compare, compare_lists, fact, facts
from tests.conformance.placing import DOUBLE, place

#: what these ops return is uninitialised memory: only its geometry can be compared
UNINITIALISED = frozenset(
    {"empty", "empty_like", "empty_permuted", "empty_strided", "new_empty", "new_empty_strided"}
)


@dataclass(frozen=True)
class Failure:
    """``kind``: "error" where genie raised and the CPU did not, "wrong" for everything else."""

    check: str  # "forward", "in-place", "out", "backward"
    dtype: str
    sample: int
    kind: str
    error: str  # class name of what was raised; "" for a wrong result
    message: str

    def __str__(self) -> str:
        return f"{self.check} {self.dtype} sample {self.sample}: {self.kind} {self.error} {self.message}"


@dataclass
class Report:
    """Everything that was compared for one op."""

    compared: dict[str, int]  # check -> samples whose results were compared
    refused: int  # samples that the CPU refuses too
    by_error: dict[str, int]  # check -> those of the compared that pass by `_as_accurate` alone
    failures: list[Failure]

    @property
    def wrong(self) -> list[Failure]:
        return [f for f in self.failures if f.kind == "wrong"]


def run_op(op: Any, count: int, stop: int = 1 << 30) -> Report:
    """All checks of one op on at most ``count`` samples per dtype, in the session that is open.

    Stops a check of a dtype after ``stop`` failures.
    """
    report = Report({}, 0, {}, [])
    for dtype in dtypes_of(op):
        with_grad = op.supports_autograd and dtype in op.supported_backward_dtypes("cpu")
        plain = samples_of(op, dtype, False, count)
        with_leaves = samples_of(op, dtype, True, count) if with_grad else []
        for check, needs_grad, function in _CHECKS:
            failed = 0
            for number, sample in enumerate(with_leaves if needs_grad else plain):
                if failed >= stop:
                    break
                failure = _one(function, op, sample, report, check)
                if failure is not None:
                    kind, error, message = failure
                    report.failures.append(Failure(check, str(dtype)[6:], number, kind, error, message[:400]))
                    failed += 1
    return report


def _one(function: Any, op: Any, sample: Any, report: Report, check: str) -> tuple[str, str, str] | None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            outcome = function(op, sample)
        except Differs as exc:
            return "wrong", "", str(exc)
        except _GenieRaised as exc:
            cause = exc.__cause__
            return "error", type(cause).__name__, str(cause)
    if outcome is _Outcome.REFUSED:
        report.refused += 1
    elif outcome is not None:
        report.compared[check] = report.compared.get(check, 0) + 1
        if outcome is _Outcome.AS_ACCURATE:
            report.by_error[check] = report.by_error.get(check, 0) + 1
    return None


class _Outcome(Enum):
    """Of a sample that is as it should be; a check returns None for one that it does not apply to."""

    SAME = "within the default tolerances"
    AS_ACCURATE = "outside them, but as accurate as the CPU"
    REFUSED = "refused by both"


class _GenieRaised(Exception):
    """Device genie raised (the cause) where the CPU did not."""


def _both(program: Callable[[str], Any]) -> tuple[Any, Any] | None:
    """``program("cpu")`` and ``program("genie")``, the latter's values on the CPU; None if both raise."""
    seed_cpu()
    try:
        expected = program("cpu")
    except Exception:  # noqa: BLE001 - whatever the CPU refuses, genie must refuse as well
        expected = _REFUSED
    _seed_genie()
    try:
        got = program(DEVICE)
    except Differs:
        raise
    except Exception as exc:
        if expected is _REFUSED:
            return None
        raise _GenieRaised from exc
    if expected is _REFUSED:
        raise Differs("runs on genie, but the CPU refuses it")
    return expected, got


def _seed_genie() -> None:
    seed_cpu()
    torch.genie.manual_seed_all(SEED)  # type: ignore[attr-defined]


_REFUSED = object()


def _judge(program: Callable[[str], Any], compare: Callable[[Any, Any], None]) -> _Outcome:
    """Compares the two devices. Raises Differs."""
    results = _both(program)
    if results is None:
        return _Outcome.REFUSED
    try:
        compare(*results)
    except ValuesDiffer as exc:
        if not _as_accurate(program, exc):
            raise
        return _Outcome.AS_ACCURATE
    return _Outcome.SAME


def _as_accurate(program: Callable[[str], Any], found: ValuesDiffer) -> bool:
    """Another kernel for the same op may round otherwise (attention with a gradient does). A float32 value
    outside the default tolerance passes only if its error against double precision is at most twice the
    CPU kernel's plus 16 ulp of the largest element. Errors are the largest over the tensor."""
    if found.expected.dtype is not torch.float32:
        return False
    seed_cpu()
    reference = program(DOUBLE)
    true_facts = getattr(reference, found.group) if found.group else reference
    true = true_facts[found.index].value
    errors = [(t.double() - true).abs().max() for t in (found.got, found.expected)]
    last_place = torch.finfo(torch.float32).eps * true.abs().max()
    return bool(errors[0] <= 2 * errors[1] + 16 * last_place)  # False for NaN


def _call(op: Any, function: Any, sample: Any, device: str) -> tuple[Any, list[torch.Tensor]]:
    inputs, args, kwargs = (place(v, device) for v in (sample.input, list(sample.args), sample.kwargs))
    if op.name == "tensor_split" and isinstance(args[0], torch.Tensor):
        args[0] = place(sample.args[0], "cpu")  # PyTorch wants these indices on the CPU, whatever the device
    result = function(inputs, *args, **kwargs)
    return result, list(tensors_in([inputs, args, kwargs]))


def _forward(op: Any, sample: Any) -> _Outcome | None:
    def program(device: str) -> Any:
        result, operands = _call(op, op.get_op(), sample, device)
        return facts(result, operands, _values_matter(op))

    strict = isinstance(op, (UnaryUfuncInfo, BinaryUfuncInfo))
    return _judge(program, lambda e, g: compare(e, g, strict_strides=strict))


def _in_place(op: Any, sample: Any) -> _Outcome | None:
    function = op.get_inplace()
    if (
        function is None
        or sample.broadcasts_input
        or not isinstance(sample.input, (torch.Tensor, list, tuple))
    ):
        return None

    def program(device: str) -> Any:
        result, operands = _call(op, function, sample, device)
        return facts(result, operands, _values_matter(op))

    return _judge(program, lambda e, g: compare(e, g, strict_strides=True))


def _out(op: Any, sample: Any) -> _Outcome | None:
    """``out=`` given tensors of the right shape, and of no elements (which are resized).

    Compared with the CPU's result without ``out=``: some of PyTorch's own out= kernels are wrong there.
    """
    if not op.supports_out:
        return None
    seed_cpu()
    try:
        plain = _call(op, op.get_op(), sample, "cpu")[0]
    except Exception:  # noqa: BLE001 - the forward check tells about ops that refuse a sample
        return None
    shaped = [plain] if isinstance(plain, torch.Tensor) else list(plain) if isinstance(plain, tuple) else []
    if not shaped or not all(isinstance(t, torch.Tensor) for t in shaped):
        return None
    wanted = [fact(t, _values_matter(op)) for t in shaped]
    for empty in (False, True):

        def program(device: str, empty: bool = empty) -> Any:
            outs = [torch.empty(0 if empty else t.shape, dtype=t.dtype, device=device) for t in shaped]
            target = outs[0] if isinstance(plain, torch.Tensor) else tuple(outs)
            result = _call(op, lambda *a, **k: op.get_op()(*a, **k, out=target), sample, device)[0]
            if any(r is not o for r, o in zip(tensors_in(result), outs, strict=True)):
                raise Differs("out= is not what the call returned")
            return [fact(t, _values_matter(op)) for t in outs]

        if not _cpu_accepts(program):
            return _Outcome.REFUSED
        _seed_genie()
        try:
            got = program(DEVICE)
        except Differs:
            raise
        except Exception as exc:
            raise _GenieRaised from exc
        compare_lists(wanted, got, "out", strict_strides=False)
    return _Outcome.SAME


def _cpu_accepts(program: Callable[[str], Any]) -> bool:
    try:
        program("cpu")
    except Exception:  # noqa: BLE001 - PyTorch refuses some empty out= that genie can resize
        return False
    return True


def _backward(op: Any, sample: Any) -> _Outcome | None:
    def program(device: str) -> Any:
        result, operands = _call(op, op.get_op(), sample, device)
        leaves = [t for t in operands if t.requires_grad]
        if sample.output_process_fn_grad is not None:
            result = sample.output_process_fn_grad(result)
        outs = [t for t in tensors_in(result) if t.requires_grad]
        if not outs or not leaves:
            return []
        numbers = torch.Generator().manual_seed(SEED)
        given = [
            torch.randn(t.shape, dtype=_single(t.dtype), generator=numbers).to(t.device, t.dtype)
            for t in outs
        ]
        grads = torch.autograd.grad(outs, leaves, given, allow_unused=True)
        return [len(outs), *(None if g is None else fact(g, _values_matter(op)) for g in grads)]

    return _judge(program, lambda e, g: compare_lists(e, g, "gradient", strict_strides=False))


def _single(dtype: torch.dtype) -> torch.dtype:
    """The dtype to draw numbers in, so that they are the same ones in double precision."""
    return {torch.float64: torch.float32, torch.complex128: torch.complex64}.get(dtype, dtype)


_CHECKS: list[tuple[str, bool, Any]] = [
    ("forward", False, _forward),
    ("in-place", False, _in_place),
    ("out", False, _out),
    ("backward", True, _backward),
]


def _values_matter(op: Any) -> bool:
    return op.name not in UNINITIALISED
