"""PyTorch's operator database as test cases: which ops, which dtypes, which sample inputs.

Importing ``torch.testing._internal`` freezes the flags under ``torch.backends`` and selects a
profile of hypothesis for the whole process; both are put back here, because other tests share it.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterator
from itertools import islice
from typing import Any

import hypothesis
import numpy
import torch

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from torch.testing._internal.common_methods_invocations import op_db

torch.backends.__allow_nonbracketed_mutation_flag = True
hypothesis.settings.load_profile("default")

#: samples per op and dtype: of the first ``POOL`` that the database makes, so many, evenly spread
DEFAULT_SAMPLES = 3
ALL_SAMPLES = 200
#: elements of the largest tensor of a sample; larger samples are left out
MAX_ELEMENTS = 1 << 18
SEED = 1234

OPS: dict[str, Any] = {op.formatted_name: op for op in op_db}
assert len(OPS) == len(op_db), "op names with variant are no longer unique"


def sample_count(option: str) -> int:
    """``all``, or a number of samples per op and dtype."""
    return ALL_SAMPLES if option == "all" else int(option)


def dtypes_of(op: Any) -> list[torch.dtype]:
    """float32 and int64 where supported; an op that takes neither is tried with its first dtype."""
    supported = op.supported_dtypes("cpu")
    chosen = [d for d in (torch.float32, torch.int64) if d in supported]
    return chosen or sorted(supported, key=str)[:1]


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for x in value:
            yield from tensors_in(x)
    elif isinstance(value, dict):
        for x in value.values():
            yield from tensors_in(x)


def seed_cpu() -> None:
    """As `torch.manual_seed`, for the CPU alone: that one formats the call stack for each kind of GPU that
    is not in use, which costs more than most ops here do."""
    torch.default_generator.manual_seed(SEED)


def samples_of(op: Any, dtype: torch.dtype, requires_grad: bool, count: int) -> list[Any]:
    """At most ``count`` sample inputs on the CPU, the same ones in every process."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pool = [s for s in islice(_made(op, dtype, requires_grad), 4 * count) if _is_small(s)]
    if len(pool) <= count:
        return pool
    return [pool[i * len(pool) // count] for i in range(count)]


def _made(op: Any, dtype: torch.dtype, requires_grad: bool) -> Iterator[Any]:
    """What ``op.sample_inputs`` yields, seeded before each sample as there. That method looks for a
    unittest on the call stack with `inspect.stack`, twice a call: a quarter of a second each under pytest."""
    seed_cpu()
    samples = iter(op.sample_inputs_func(op, "cpu", dtype, requires_grad))
    while True:
        for seed in (torch.default_generator.manual_seed, random.seed, numpy.random.seed):
            seed(SEED)
        try:
            yield next(samples)
        except StopIteration:
            return


def _is_small(sample: Any) -> bool:
    everything = tensors_in([sample.input, sample.args, sample.kwargs])
    return all(t.layout is not torch.strided or t.numel() <= MAX_ELEMENTS for t in everything)
