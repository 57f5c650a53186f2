"""The executor in this process: a bounded cache of templates."""

from __future__ import annotations

import torch

import genie
from genie.runtime.in_process import InProcessExecutor


def test_programs_over_the_bound_are_compiled_again():
    def work(x: torch.Tensor, length: int) -> torch.Tensor:
        for _ in range(length):
            x = x * 3 - 1
        return x

    executor = InProcessExecutor(torch.device("cpu"), max_templates=2)
    with genie.Session(executor).activate(), torch.no_grad():
        x, host = torch.ones(4).to("genie"), torch.ones(4)
        for _ in range(3):
            for length in (1, 2, 3, 4):
                assert torch.equal(work(x, length).cpu(), work(host, length))
                assert len(executor._templates) <= 2 and len(executor.graphs) <= 2
