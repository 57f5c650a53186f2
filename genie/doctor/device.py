"""The device that the suite will use: a GPU, or cores of the CPU."""

from __future__ import annotations

from collections.abc import Iterator

from genie import nvml
from genie.doctor.findings import Finding, Request, not_applicable, ok, warning
from genie.doctor.needs import GPU_BYTES, profile_of

NO_NVML = (
    "results are valid without it, but their `gpu` lacks energy, utilisation or clocks: use a whole GPU "
    "(a slice tells less), and let the container reach the driver's libnvidia-ml.so.1"
)


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


def check_nvml(request: Request) -> Iterator[Finding]:
    """Whether the suite can record what a request costs a GPU beside its time."""
    import torch

    with nvml.loaded() as (driver, why):
        if driver is None:
            if not torch.cuda.is_available():
                yield not_applicable("NVML", why)
            else:
                yield warning("NVML", why, NO_NVML)
            return
        if not torch.cuda.is_available():
            yield not_applicable("NVML", f"it answers, driver {driver.version()}, but torch uses no GPU")
            return
        for index in range(torch.cuda.device_count()):
            handle = driver.by_uuid(str(torch.cuda.get_device_properties(index).uuid))
            if handle is None:
                yield warning(f"NVML cuda:{index}", f"it does not find torch's GPU ({driver.why})", NO_NVML)
                continue
            state = driver.state(handle)
            told = [name for name in ("energy_mj", "utilization", "sm_mhz", "memory_mhz", "power_limit_w")
                    if getattr(state, name) is not None]  # fmt: skip
            found = f"{state.uuid} tells {', '.join(told) or 'nothing'}; driver {state.driver}"
            if state.why:
                yield warning(f"NVML cuda:{index}", f"{found}; refused: {state.why}", NO_NVML)
            else:
                yield ok(f"NVML cuda:{index}", found)


def check_gpu_clocks(request: Request) -> Iterator[Finding]:
    with nvml.loaded() as (driver, why):
        if driver is None:
            yield not_applicable("GPU clocks", f"no NVIDIA driver answers ({why})")
            return
        for index in range(driver.count()):
            yield _clocks(driver, index)


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
    with nvml.loaded() as (driver, _):
        return 0 if driver is None else driver.count()


def _clocks(driver: nvml.Driver, index: int) -> Finding:
    name = f"GPU {index} clocks"
    handle = driver.by_index(index)
    state = nvml.GpuState(why=driver.why) if handle is None else driver.state(handle)
    if state.sm_mhz is None or state.slowed_by is None:
        return not_applicable(name, f"the driver does not tell ({state.why})")
    found = f"SM {state.sm_mhz} MHz, at most {state.max_sm_mhz} MHz; driver {state.driver}"
    if state.slowed_by:
        return warning(
            name,
            f"{found}; slowed by: {', '.join(state.slowed_by)}",
            "let it cool down or raise its power limit, or lock its clocks lower (nvidia-smi "
            "--lock-gpu-clocks) so that they are the same in every run",
        )
    return ok(name, f"{found}; not slowed")
