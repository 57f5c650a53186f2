"""A Ray cluster for tests that ends with its parent: ``python -m tests.launch.ray_nodes``.

One node on this machine, or one in each of the network namespaces that are given as NAME=ADDRESS.
"""

import argparse
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from genie.runtime.child_process import ChildProcess, die_with_parent, report_ready, wait_for_end_of_input
from tests.launch.netns import Host

START_S = 110


@contextmanager
def ray_cluster(cpus: int, *hosts: Host) -> Iterator[str]:
    """Its address, while it runs, with ``cpus`` CPUs on each node."""
    # Ray's sockets live below it, and a socket's path may have 107 characters: not under pytest's folder.
    folder = Path(tempfile.mkdtemp(prefix="gray", dir="/tmp"))
    arguments = ["--cpus", str(cpus), *(f"{host.name}={host.address}" for host in hosts)]
    environ = {"RAY_TMPDIR": str(folder), "RAY_USAGE_STATS_ENABLED": "0"}
    nodes = ChildProcess("tests.launch.ray_nodes", arguments, folder / "log", environ)
    try:
        yield str(nodes.wait_ready(START_S)["address"])
    finally:
        nodes.stop(grace_s=15)
        shutil.rmtree(folder, ignore_errors=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--parent", type=int, required=True)
    parser.add_argument("--ready-fd", type=int, required=True)
    parser.add_argument("--cpus", type=int, required=True)
    parser.add_argument("hosts", nargs="*")
    args = parser.parse_args()
    die_with_parent(args.parent, signal.SIGTERM)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(1))

    from ray.cluster_utils import Cluster

    folder = os.path.join(os.environ["RAY_TMPDIR"], "ray")
    os.makedirs(folder)
    common = {
        "num_cpus": args.cpus, "object_store_memory": 100 << 20, "include_dashboard": False,
        "temp_dir": folder,
    }  # fmt: skip
    cluster = Cluster()
    try:
        hosts = [Host(*text.split("=")) for text in args.hosts]
        for host in hosts or [None]:
            with host.entered() if host else nullcontext():
                cluster.add_node(**common, **({"node_ip_address": host.address} if host else {}))
        report_ready(args.ready_fd, {"address": cluster.address})
        wait_for_end_of_input()
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        cluster.shutdown()


if __name__ == "__main__":
    main()
