"""A local Ray cluster that lives exactly as long as its parent: ``python -m genie.baselines.ray_cluster``.

Over link "tcp" the head has no CPUs and serves the driver; one further raylet holds the actors. Over
"shm" the head holds both. Ray asks the kernel to kill its daemons when this process ends, and a
raylet's workers end with it; so this process has only to end with its own parent.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys

from genie.runtime.child_process import die_with_parent, report_ready, wait_for_end_of_input

#: Loopback addresses of the two raylets. Not 127.0.0.1, which ``ray.init`` replaces by the host's outer
#: address, where nothing of ours listens.
HEAD_ADDRESS = "127.0.0.2"
ACTORS_ADDRESS = "127.0.0.3"
#: resource that only the actors' node has: keeps them off the client's
ACTOR_RESOURCE = "genie_actor"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--parent", type=int, required=True)
    parser.add_argument("--ready-fd", type=int, required=True)
    parser.add_argument("--actors", type=int, required=True)
    parser.add_argument("--store-bytes", type=int, required=True)
    parser.add_argument("--link", choices=("tcp", "shm"), required=True)
    args = parser.parse_args()
    die_with_parent(args.parent, signal.SIGTERM)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(1))

    from ray.cluster_utils import Cluster

    # Cluster writes its address there, and would look for the folder in vain.
    folder = os.path.join(os.environ["RAY_TMPDIR"], "ray")
    os.makedirs(folder)
    common = {
        "object_store_memory": args.store_bytes,
        "include_dashboard": False,
        "temp_dir": folder,
    }
    for_actors = {"num_cpus": args.actors, "resources": {ACTOR_RESOURCE: args.actors}}
    cluster = Cluster()
    try:
        for_head = for_actors if args.link == "shm" else {"num_cpus": 0}
        head = node = cluster.add_node(node_ip_address=HEAD_ADDRESS, **common, **for_head)
        if args.link == "tcp":
            node = cluster.add_node(node_ip_address=ACTORS_ADDRESS, **common, **for_actors)
        processes = head.all_processes
        report_ready(
            args.ready_fd,
            {
                "address": cluster.address,
                "logs": head.get_logs_dir_path(),
                "head_node": head.node_id,
                "gcs": processes["gcs_server"][0].process.pid,
                "head_raylet": processes["raylet"][0].process.pid,
                "actor_raylet": node.all_processes["raylet"][0].process.pid,
            },
        )
        wait_for_end_of_input()
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        cluster.shutdown()


if __name__ == "__main__":
    main()
