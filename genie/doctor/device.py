"""The device that the suite will use: a GPU, or cores of the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from genie.doctor.findings import Finding, Request, not_applicable, ok, warning
from genie.doctor.needs import GPU_BYTES, profile_of

#: of NVML's clocks event reasons: clocks below what the GPU was asked for, because it must
SLOWED_BY = {0x4: "power cap", 0x8: "hardware slowdown", 0x20: "thermal (software)",
             0x40: "thermal (hardware)", 0x80: "power brake"}  # fmt: skip


def check_device(request: Request) -> Iterator[Finding]:
    import torch

    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            yield _gpu(index, profile_of(request))
        return
    from genie.devices import available_cores, cores_per_device

    seen = _driver_gpus()
    if seen:
        yield warning(
            "device",
            f"the driver lists {seen} GPU(s), but torch {torch.__version__} sees none",
            "install a CUDA build of torch for this driver, or check CUDA_VISIBLE_DEVICES",
        )
    size, cores = cores_per_device(), len(available_cores())
    found = f"no CUDA; a device is {size} of the {cores} CPU cores"
    if cores < 2:
        yield warning(
            "device",
            f"{found}: client and server share it",
            "use a machine with two cores or more; figures of remote baselines mean little here",
        )
    else:
        yield ok("device", f"{found}, so the suite starts {min(2, cores // size)} servers")


def check_gpu_clocks(request: Request) -> Iterator[Finding]:
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        yield not_applicable("GPU clocks", f"no NVIDIA driver answers ({error})")
        return
    try:
        for index in range(pynvml.nvmlDeviceGetCount()):
            yield _clocks(pynvml, index)
    finally:
        pynvml.nvmlShutdown()


def _gpu(index: int, profile: str) -> Finding:
    import torch

    free, total = torch.cuda.mem_get_info(index)
    found = (
        f"cuda:{index} {torch.cuda.get_device_name(index)}, CUDA {torch.version.cuda}, "
        f"{free / 2**30:.0f} of {total / 2**30:.0f} GiB free"
    )
    need = GPU_BYTES[profile]
    if free < need:
        return warning(
            f"device cuda:{index}",
            found,
            f"profile {profile} needs about {need / 2**30:.0f} GiB on each GPU: stop what else runs on it "
            "(nvidia-smi), or use a smaller --genie-profile",
        )
    return ok(f"device cuda:{index}", found)


def _driver_gpus() -> int:
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return 0
    try:
        return int(pynvml.nvmlDeviceGetCount())
    finally:
        pynvml.nvmlShutdown()


def _clocks(nvml: Any, index: int) -> Finding:
    name = f"GPU {index} clocks"
    try:
        handle = nvml.nvmlDeviceGetHandleByIndex(index)
        now = nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM)
        most = nvml.nvmlDeviceGetMaxClockInfo(handle, nvml.NVML_CLOCK_SM)
        reasons = nvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle)
        driver = nvml.nvmlSystemGetDriverVersion()
    except nvml.NVMLError as error:
        return not_applicable(name, f"the driver does not tell ({error})")
    found = f"SM {now} MHz, at most {most} MHz; driver {driver}"
    slowed = [text for bit, text in SLOWED_BY.items() if reasons & bit]
    if slowed:
        return warning(
            name,
            f"{found}; slowed by: {', '.join(slowed)}",
            "let it cool down or raise its power limit, or lock its clocks lower (nvidia-smi "
            "--lock-gpu-clocks) so that they are the same in every run",
        )
    return ok(name, f"{found}; not slowed")
