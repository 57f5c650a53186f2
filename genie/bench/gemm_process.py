"""One process that multiplies float32 matrices on one device, for as long as it is told.

``python -m genie.bench.gemm_process cpu:0 CORE,...``. It prints its pid and cores when it is warm;
then each line of its stdin, a number of seconds, is answered by the FLOP/s of that span. It ends
with its stdin. On CPU it uses numpy's GEMM: importing torch takes longer than the measurement.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable

#: small enough for a core's own cache, where two cores disturb each other least; and busy for a GPU
CPU_SIZE = 512
CUDA_SIZE = 4096


def cpu_gemm(cores: int) -> tuple[Callable[[], object], int]:
    """One multiplication on ``cores`` threads, and its floating-point operations."""
    os.environ.update(dict.fromkeys(("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS"), str(cores)))
    import numpy

    random = numpy.random.default_rng(0)
    left, right = (random.random((CPU_SIZE, CPU_SIZE), dtype=numpy.float32) for _ in range(2))
    target = numpy.empty_like(left)
    return lambda: numpy.matmul(left, right, out=target), 2 * CPU_SIZE**3


def cuda_gemm(device: str) -> tuple[Callable[[], object], int]:
    import torch

    left, right = (torch.rand(CUDA_SIZE, CUDA_SIZE, device=device) for _ in range(2))
    target = torch.empty_like(left)

    def multiply() -> None:
        torch.mm(left, right, out=target)
        torch.cuda.synchronize(device)

    return multiply, 2 * CUDA_SIZE**3


def flops_per_second(multiply: Callable[[], object], operations: int, seconds: float) -> float:
    done = 0
    start = time.perf_counter()
    while (spent := time.perf_counter() - start) < seconds:
        multiply()
        done += 1
    return done * operations / spent


def main(device: str, cores: list[int]) -> None:
    os.sched_setaffinity(0, cores)
    multiply, operations = cuda_gemm(device) if device.startswith("cuda") else cpu_gemm(len(cores))
    multiply()
    print(json.dumps({"pid": os.getpid(), "cores": sorted(os.sched_getaffinity(0))}), flush=True)
    for line in sys.stdin:
        print(json.dumps(flops_per_second(multiply, operations, float(line))), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], [int(core) for core in sys.argv[2].split(",")])
