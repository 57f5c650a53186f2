"""The sample inputs are those of the operator database."""

from __future__ import annotations

from itertools import islice
from typing import Any

import pytest
import torch

from tests.conformance.cases import MAX_ELEMENTS, OPS, samples_of, tensors_in

COUNT = 2


# Tensors, a list of tensors, arguments in Python, matrices.
@pytest.mark.parametrize("name", ["add", "cat", "nn_functional_dropout", "linalg_svd"])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_samples_are_those_of_the_database(name: str, requires_grad: bool) -> None:
    op = OPS[name]
    pool = list(islice(op.sample_inputs("cpu", torch.float32, requires_grad=requires_grad), 4 * COUNT))
    wanted = pool if len(pool) <= COUNT else [pool[i * len(pool) // COUNT] for i in range(COUNT)]
    got = samples_of(op, torch.float32, requires_grad, COUNT)
    assert len(got) == len(wanted)
    for g, w in zip(got, wanted, strict=True):
        tensors = [_tensors(s) for s in (g, w)]
        assert max(t.numel() for t in tensors[0]) <= MAX_ELEMENTS
        assert [t.requires_grad for t in tensors[0]] == [t.requires_grad for t in tensors[1]]
        torch.testing.assert_close(*tensors, rtol=0, atol=0, equal_nan=True)


def _tensors(sample: Any) -> list[torch.Tensor]:
    return list(tensors_in([sample.input, sample.args, sample.kwargs]))
