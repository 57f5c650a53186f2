"""Ray and PyTorch RPC: whether their baselines can run here."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

from genie.doctor.findings import PROBLEM, Finding, Request, ok, problem
from genie.doctor.libraries import INSTALL, version_finding


def check_ray(request: Request) -> Iterator[Finding]:
    version = version_finding("ray")
    yield version
    if version.status == PROBLEM:
        return
    if request.full:
        from genie.baselines.ray_actor import RayPool
        from genie.devices import device_slot, resolve_device_type

        with closing(RayPool([device_slot(resolve_device_type("auto"), 0)])) as pool:
            pool.start()
            yield ok("ray", "a cluster with one actor starts")
            return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray  # noqa: F401

    yield ok("ray", "can be imported (--full also starts it, which takes 10 to 30 s)")


def check_rpc(request: Request) -> Iterator[Finding]:
    import torch.distributed

    if not torch.distributed.is_available() or not torch.distributed.rpc.is_available():
        yield problem("pytorch rpc", "this build of torch has no torch.distributed.rpc", INSTALL)
        return
    if request.full:
        from genie.baselines.pytorch_rpc import RpcPool
        from genie.devices import device_slot, resolve_device_type

        with closing(RpcPool([device_slot(resolve_device_type("auto"), 0)])) as pool:
            pool.start()
            yield ok("pytorch rpc", "a worker starts and joins over TCP (transport uv)")
            return
    yield _alone()


def _alone() -> Finding:
    """A group of this process alone: needs the transport and the interface, and takes no time."""
    from torch.distributed import rpc

    from genie.baselines import rpc_worker

    before = os.environ.get("TP_SOCKET_IFNAME")
    os.environ["TP_SOCKET_IFNAME"] = "lo"
    try:
        with tempfile.TemporaryDirectory(prefix="genie-doctor-") as folder:
            rpc_worker.init_member(0, 1, 0, rpc_worker.options(str(Path(folder) / "store"), "tcp", 20.0))
            rpc.shutdown(graceful=False)
    finally:
        if before is None:
            del os.environ["TP_SOCKET_IFNAME"]
        else:
            os.environ["TP_SOCKET_IFNAME"] = before
    return ok("pytorch rpc", "starts in this process over TCP (transport uv); --full also starts a worker")
