"""What a device reaches at most: the rate of its matrix multiplication and the bandwidth of its memory.

Measured at the end of a run on the device of the local rows; for results without it, what the maker states.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from genie.bench.floors import Limits

if TYPE_CHECKING:
    from genie.devices import DeviceSlot

#: by torch's name of a GPU: bytes/s of its memory, and FLOP/s by dtype of dense matrices. float32 without
#: TF32, as PyTorch multiplies by default. Source: NVIDIA's data sheets of the H100 and H200 Tensor Core GPUs.
STATED: dict[str, tuple[float, dict[str, float]]] = {
    "NVIDIA H100 80GB HBM3": (3.35e12, {"float16": 989.4e12, "bfloat16": 989.4e12, "float32": 66.9e12}),
    "NVIDIA H100 PCIe": (2.0e12, {"float16": 756e12, "bfloat16": 756e12, "float32": 51.2e12}),
    "NVIDIA H200": (4.8e12, {"float16": 989.4e12, "bfloat16": 989.4e12, "float32": 66.9e12}),
}
SPAN_S = 0.15
SPANS = 3


def measure_limits(slot: DeviceSlot, dtype_name: str) -> dict[str, Any]:
    """In this process, pinned already. Plain JSON: ``model``, ``dtype``, ``flops_per_s``, ``bytes_per_s``,
    and ``how``. Takes about a second and (on a GPU) 4 GiB of its memory."""
    import torch

    from genie.device_facts import device_facts

    device, dtype = slot.torch_device, getattr(torch, dtype_name)
    cuda = slot.type == "cuda"

    def wait() -> None:
        if cuda:
            torch.cuda.synchronize(device)

    rates = []
    sizes = (4096, 8192) if cuda else (1024,)
    with torch.no_grad():
        for size in sizes:
            left, right = (torch.rand(size, size, device=device).to(dtype) for _ in range(2))
            out = torch.empty_like(left)
            repeats = 10 if cuda else 1
            once = _repeated(lambda: torch.mm(left, right, out=out), repeats, wait)  # noqa: B023
            rates.append(2 * size**3 * repeats / _fastest(once))
        source = torch.ones((2**31 if cuda else 2**27) // dtype.itemsize, device=device, dtype=dtype)
        target = torch.empty_like(source)
        bandwidths = [
            2 * source.nbytes / _fastest(_repeated(lambda: target.copy_(source), 1, wait)),
            source.nbytes / _fastest(_repeated(lambda: source.sum(), 1, wait)),
        ]
    return {
        "model": device_facts(slot).model,
        "dtype": dtype_name,
        "flops_per_s": max(rates),
        "bytes_per_s": max(bandwidths),
        "how": f"torch.mm of {' and '.join(map(str, sizes))} squared; copy and sum of "
        f"{source.nbytes >> 20} MiB; the best of {SPANS} spans of {SPAN_S:g} s each",
    }


def limits_of(measured: Sequence[Mapping[str, Any]], model: str, dtype: str) -> Limits | None:
    """Of a device by its name: measured in the run, or stated by its maker, or None."""
    for one in measured:
        if "error" not in one and (one["model"], one["dtype"]) == (model, dtype):
            return Limits(one["flops_per_s"], one["bytes_per_s"], f"measured in the run ({one['how']})")
    bandwidth, rates = STATED.get(model, (0.0, {}))
    if dtype not in rates:
        return None
    return Limits(rates[dtype], bandwidth, "stated in NVIDIA's data sheet")


def _repeated(once: Callable[[], object], repeats: int, wait: Callable[[], None]) -> Callable[[], None]:
    def run() -> None:
        for _ in range(repeats):
            once()
        wait()

    return run


def _fastest(run: Callable[[], None]) -> float:
    """Seconds of one call: the mean over a span, of the best span."""
    run()
    best = float("inf")
    for _ in range(SPANS):
        calls, start = 0, time.perf_counter()
        while (spent := time.perf_counter() - start) < SPAN_S:
            run()
            calls += 1
        best = min(best, spent / calls)
    return best
