"""Worker process of ``pytorch_rpc``: ``python -m genie.baselines.rpc_worker`` (started by RpcPool)."""

from __future__ import annotations

import argparse
import json
import os
import warnings
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch.distributed.rpc import TensorPipeRpcBackendOptions

    from genie.baselines.peer_worker import ResidentModel

_resident: ResidentModel | None = None


def call(method: str, arguments: tuple[object, ...]) -> object:
    """What the client invokes over RPC: one method of this worker's ResidentModel."""
    assert _resident is not None
    return getattr(_resident, method)(*arguments)


def options(store: str, link: str, timeout_s: float) -> TensorPipeRpcBackendOptions:
    """The same options in every member. Link "tcp" forbids the shared-memory transports and channels.

    The members meet in a file, so that there is no port to reserve; their data sockets bind to the
    interface in ``TP_SOCKET_IFNAME``.
    """
    from torch.distributed.rpc import TensorPipeRpcBackendOptions

    over_tcp: dict[str, Any] = {"_transports": ["uv"], "_channels": ["basic"]} if link == "tcp" else {}
    return TensorPipeRpcBackendOptions(init_method=f"file://{store}", rpc_timeout=timeout_s, **over_tcp)


def member_name(rank: int, generation: int) -> str:
    """Rank 0 is the client. Names are new in each generation: see ``init_member``."""
    return f"worker{rank}-{generation}" if rank else f"client-{generation}"


def init_member(rank: int, world: int, generation: int, options: object) -> None:
    """``init_rpc``, for a pool that may start more than once in one process.

    ``init_rpc`` counts in each process: its keys in the store by earlier calls, its first collective
    by earlier ones among the same names. A client that starts a second pool would wait in vain for
    fresh workers; so all members count keys from ``generation``, and no name is used twice.
    """
    from torch.distributed import rpc

    rpc._init_counter = generation
    # init_rpc's own use of Gloo trips torch's own deprecation.
    warnings.filterwarnings("ignore", message="You are using a Backend", category=UserWarning)
    rpc.init_rpc(member_name(rank, generation), rank=rank, world_size=world, rpc_backend_options=options)


def main() -> None:
    global _resident
    parser = argparse.ArgumentParser()
    parser.add_argument("--parent", type=int, required=True)
    parser.add_argument("--ready-fd", type=int, required=True)
    parser.add_argument("--slot", type=json.loads, required=True)
    parser.add_argument("--rank", type=int, required=True)
    parser.add_argument("--world", type=int, required=True)
    parser.add_argument("--generation", type=int, required=True)
    parser.add_argument("--store", required=True)
    parser.add_argument("--link", choices=("tcp", "shm"), required=True)
    parser.add_argument("--timeout", type=float, required=True)
    args = parser.parse_args()
    # Before torch is imported: threads that it starts inherit the mask.
    os.sched_setaffinity(0, args.slot["cores"])

    from genie.runtime.child_process import die_with_parent, report_ready, wait_for_end_of_input

    die_with_parent(args.parent)

    from genie.baselines.peer_worker import ResidentModel
    from genie.devices import DeviceSlot

    slot = DeviceSlot(args.slot["type"], args.slot["index"], tuple(args.slot["cores"]))
    _resident = ResidentModel(slot)
    report_ready(args.ready_fd, {"pid": os.getpid()})
    init_member(
        args.rank,
        args.world,
        args.generation,
        options(args.store, args.link, args.timeout),
    )
    wait_for_end_of_input()
    # A graceful rpc.shutdown() waits for the client, which may be dead.
    os._exit(0)


if __name__ == "__main__":
    # RPC names ``call`` by module: the state must live in that module, not in ``__main__``.
    from genie.baselines import rpc_worker

    rpc_worker.main()
