"""What a profile of the suite needs. Estimates, rounded up, for warnings and not for limits."""

from __future__ import annotations

from genie.doctor.findings import Request

GIB = 2**30
#: bytes of a profile's largest model (2-layer CLIP, CLIP ViT-B/32 in fp32, GPT-2-XL in fp16)
MODEL_BYTES = {"smoke": 0.1 * GIB, "cpu": 0.6 * GIB, "gpu": 3.2 * GIB}
#: a process that has imported torch; Ray's own daemons beside its actors
PROCESS_BYTES = 0.4 * GIB
RAY_BYTES = 1.0 * GIB
#: copies of a model in the client: the reference, the one in use, one on its way
CLIENT_COPIES = 3
#: a server, an RPC worker and a Ray actor stay on every device to the end of the run
PROCESSES_PER_DEVICE = 3
#: on each GPU: the resident models of its processes, their CUDA contexts, caches and workspace
GPU_BYTES = {"smoke": 3 * GIB, "cpu": 6 * GIB, "gpu": 24 * GIB}


def host_bytes(profile: str, devices: int) -> float:
    """Main memory that a whole matrix needs at its end, when every pool runs."""
    processes = devices * PROCESSES_PER_DEVICE
    copies = CLIENT_COPIES + processes
    return (1 + processes) * PROCESS_BYTES + RAY_BYTES + copies * MODEL_BYTES[profile]


def profile_of(request: Request) -> str:
    """As the suite chooses: gpu with CUDA, else cpu."""
    if request.profile is not None:
        return request.profile
    import torch

    return "gpu" if torch.cuda.is_available() else "cpu"


def device_count() -> int:
    """How many servers the suite would start."""
    import torch

    from genie.devices import available_cores, cores_per_device

    if torch.cuda.is_available():
        return torch.cuda.device_count()
    return min(2, len(available_cores()) // cores_per_device())
