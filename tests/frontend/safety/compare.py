"""The one comparison of this suite: a program on device genie against the same program on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

#: float32, small sums; integers, booleans and Python values must be equal
RTOL, ATOL = 1e-5, 1e-6


class Capture:
    """Turns a function or module into what the mode under test calls in its place."""

    device: str

    def __call__(self, program: Any) -> Any:
        raise NotImplementedError


class Eager(Capture):
    """The program as it is, on the CPU: what every mode must agree with."""

    device = "cpu"

    def __call__(self, program: Any) -> Any:
        return program


def same(capture: Capture, program: Callable[[Capture], Any], seed: int = 0) -> None:
    """Runs ``program(capture)`` for the CPU and for the mode under test, from one seed, and compares
    everything that it returns (tensors, Python values, and lists, tuples and dicts of them)."""
    torch.manual_seed(seed)
    expected = program(Eager())
    torch.manual_seed(seed)
    got = program(capture)
    assert_same(got, expected)


def assert_same(got: Any, expected: Any) -> None:
    if isinstance(expected, torch.Tensor):
        assert got.device.type == "genie"
        assert (got.shape, got.dtype) == (expected.shape, expected.dtype)
        assert got.requires_grad == expected.requires_grad
        torch.testing.assert_close(got.detach().cpu(), expected.detach(), rtol=RTOL, atol=ATOL)
    elif isinstance(expected, dict):
        assert got.keys() == expected.keys()
        for key in expected:
            assert_same(got[key], expected[key])
    elif isinstance(expected, (list, tuple)):
        assert len(got) == len(expected)
        for g, e in zip(got, expected, strict=True):
            assert_same(g, e)
    else:
        assert got == expected


def numbers(device: str, *shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Normal numbers of a seed, the same on every device."""
    host = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return host.to(dtype).to(device)


def counting(device: str, *shape: int) -> torch.Tensor:
    """0, 1, 2, ... as float32."""
    return torch.arange(torch.Size(shape).numel(), dtype=torch.float32).reshape(shape).to(device)
