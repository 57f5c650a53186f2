"""The Ray driver that owns a pool's actors: ``python -m genie.launch.ray_driver``.

A process of its own, because a process drives one Ray cluster, and the client's may be another: baseline
``ray`` makes one. It ends with its parent, and the actors, their servers and the placement group with it.

The parent writes one JSON line to stdin, what to start; the driver answers with one. From then on every
line is a question about the servers, and gets one line; at the end of stdin the driver closes everything.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import logging
import os
import signal
import socket
import sys
import time
from collections import Counter
from typing import Any

from genie.errors import ConfigError, ConnectError, GenieError, RemoteError
from genie.launch.bind import Bind

_PROBE_SECONDS = 5.0
_ASK_SECONDS = 10.0
_PR_SET_PDEATHSIG = 1
_CLOSE_SECONDS = 15.0
#: In a driver whose cluster is gone Ray makes 20 tries of some 40 s each otherwise.
_RAY_ENV = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_NUM_REDIS_GET_RETRIES": "1"}
_REMEDY = (
    "start one with `ray start --head` on this host (and `ray start --address HEAD:6379` on the others), "
    "give --genie-ray-address or RAY_ADDRESS, or leave out --genie-launcher ray"
)


class Pool:
    """Actors in one placement group. ``start`` is called once; ``close`` after any failure, too."""

    def __init__(self, count: int, device_type: str, strategy: str, bind: Bind, seconds: float) -> None:
        self._count = count
        self._device_type = device_type
        self._strategy = strategy
        self._bind = bind
        self._deadline = time.monotonic() + seconds
        self._ray: Any = None
        self._group: Any = None
        self._actors: list[Any] = []

    def start(self, address: str, token: str, threads: str | None) -> list[dict[str, Any]]:
        """What each server's `ServerActor.start` returned, and its host's name.

        Raises ConfigError, ConnectError, AuthError.
        """
        self._connect(address)
        ray = self._ray
        try:
            self._place()
            nodes = self._nodes()
            hosts = self._hosts(nodes)
            self._make_actors()
            places: Counter[str] = Counter()
            starting = []
            for actor, node, host in zip(self._actors, nodes, hosts, strict=True):
                place = places[node["NodeID"]]
                places[node["NodeID"]] += 1
                starting.append(
                    actor.start.remote(self._device_type, place, host, token, self._bind.serve_args, threads)
                )
            started = ray.get(starting, timeout=self._left())
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, RemoteError):
                raise error.cause from None
            raise ConnectError(
                f"an actor failed: {_last_line(error)}; is Genie installed on all nodes?"
            ) from error
        except ray.exceptions.GetTimeoutError as error:
            raise ConnectError("the actors of the Ray cluster did not start their servers in time") from error
        except ray.exceptions.RayError as error:
            raise ConnectError(f"the Ray cluster lost the pool's actors: {_last_line(error)}") from error
        return [
            told | {"host": node["NodeManagerHostname"]} for told, node in zip(started, nodes, strict=True)
        ]

    def _connect(self, address: str) -> None:
        _probe(address)
        os.environ.update(_RAY_ENV)
        try:
            import ray
        except ImportError as error:
            raise ConfigError(
                f"--genie-launcher ray needs Ray, which does not import ({error}): pip install ray"
            ) from error
        try:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        except (ConnectionError, RuntimeError, ValueError, AssertionError) as error:
            raise ConnectError(
                f"no Ray cluster answers at {address!r} ({_last_line(error)}): {_REMEDY}"
            ) from error
        self._ray = ray

    def _place(self) -> None:
        from ray.util.placement_group import placement_group

        share = self._share()
        self._group = placement_group([share] * self._count, strategy=self._strategy)
        if not self._group.wait(self._left()):
            wanted = ", ".join(f"{amount:g} {name}" for name, amount in share.items())
            free = self._ray.available_resources()
            raise ConnectError(
                f"the Ray cluster did not place {self._count} servers with {wanted} each in time: it has "
                f"{free.get('CPU', 0):g} CPU and {free.get('GPU', 0):g} GPU free; lower --genie-servers, or "
                "wait until others have ended"
            )

    def _nodes(self) -> list[dict[str, Any]]:
        """The node of each server, as `ray.nodes` tells it."""
        from ray.util.placement_group import placement_group_table

        nodes = {node["NodeID"]: node for node in self._ray.nodes()}
        placed = placement_group_table(self._group)["bundles_to_node_id"]
        return [nodes[placed[index]] for index in range(self._count)]

    def _make_actors(self) -> None:
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        from genie.launch.ray_actor import ServerActor

        share = self._share()
        remote = self._ray.remote(ServerActor)
        self._actors = [
            remote.options(
                num_cpus=share.get("CPU", 0),
                num_gpus=share.get("GPU", 0),
                max_restarts=0,
                scheduling_strategy=PlacementGroupSchedulingStrategy(
                    placement_group=self._group, placement_group_bundle_index=index
                ),
            ).remote()
            for index in range(self._count)
        ]

    def _share(self) -> dict[str, float]:
        """What one server asks of Ray: a GPU, or as many CPUs as a device has cores here (genie.devices)."""
        if self._device_type == "cuda":
            return {"GPU": 1}
        cpus = [node["Resources"].get("CPU", 0) for node in self._ray.nodes() if node["Alive"]]
        return {"CPU": max(1, min((int(count) for count in cpus if count >= 1), default=1) // 4)}

    def _hosts(self, nodes: list[dict[str, Any]]) -> list[str]:
        """What each server binds: loopback when all are on the driver's node, else its node's address."""
        here = self._ray.get_runtime_context().get_node_id()
        elsewhere = sorted({node["NodeManagerAddress"] for node in nodes if node["NodeID"] != here})
        if not elsewhere:
            return ["127.0.0.1"] * len(nodes)
        if not self._bind.insecure and self._bind.tls_cert is None:
            raise ConfigError(
                f"Ray has placed servers on other nodes ({', '.join(elsewhere)}): give --genie-tls-cert and "
                "--genie-tls-key, or spell out --genie-insecure on a network that you trust"
            )
        return [node["NodeManagerAddress"] for node in nodes]

    def state(self) -> list[tuple[bool, str]]:
        """Of each server: whether it lives, and the end of its log."""
        told = []
        deadline = time.monotonic() + _ASK_SECONDS
        for actor in self._actors:
            try:
                left = max(0.1, deadline - time.monotonic())
                told.append(self._ray.get(actor.state.remote(), timeout=left))
            except (self._ray.exceptions.RayError, self._ray.exceptions.GetTimeoutError) as error:
                told.append((False, f"its Ray actor does not answer: {_last_line(error)}"))
        return told

    def close(self) -> None:
        if self._ray is None:
            return
        ray, self._ray = self._ray, None
        errors = (ray.exceptions.RayError, ray.exceptions.GetTimeoutError)
        try:
            ray.get([actor.close.remote() for actor in self._actors], timeout=_CLOSE_SECONDS)
        except errors as error:
            print(f"an actor did not close its server, so it is killed: {error}", file=sys.stderr)
        for actor in self._actors:
            ray.kill(actor)
        if self._group is not None:
            from ray.util.placement_group import remove_placement_group

            remove_placement_group(self._group)
        ray.shutdown()

    def _left(self) -> float:
        return max(0.1, self._deadline - time.monotonic())


def _probe(address: str) -> None:
    """Raises ConnectError where nothing listens: Ray itself would try for most of a minute."""
    if address == "auto":
        address = os.environ.get("RAY_ADDRESS", "")
    if "://" in address:
        raise ConfigError(
            f"{address}: Ray's client protocol is not supported; run on a node of the cluster, and give "
            "the address of its head, HOST:PORT"
        )
    host, _, port = address.rpartition(":")
    if not port.isdecimal():  # "auto", or a word that Ray knows
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), _PROBE_SECONDS).close()
    except OSError as error:
        raise ConnectError(
            f"no Ray cluster answers at {address} ({error.strerror or error}): {_REMEDY}"
        ) from error


def _last_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[-1]


def _die_with_parent(parent: int) -> None:
    """The kernel sends SIGTERM when the thread that started us ends; must run in the main thread."""
    # Like genie.runtime.child_process, which imports torch: seconds that a driver has no use for.
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM)) != 0:
        raise OSError(ctypes.get_errno(), f"prctl: {os.strerror(ctypes.get_errno())}")
    if os.getppid() != parent:  # it ended before the call above
        sys.exit(1)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--parent", type=int, required=True)
    parser.add_argument("--ready-fd", type=int, required=True)
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(1))
    _die_with_parent(args.parent)
    with os.fdopen(args.ready_fd, "w") as answers:

        def answer(message: object) -> None:
            answers.write(json.dumps(message) + "\n")
            answers.flush()

        wanted = json.loads(sys.stdin.readline())
        pool = Pool(
            wanted["count"],
            wanted["device_type"],
            wanted["strategy"],
            Bind(**wanted["bind"]),
            wanted["seconds"],
        )
        try:
            try:
                servers = pool.start(wanted["address"], wanted["token"], wanted["threads"])
            except GenieError as error:
                log_tail = getattr(error, "log_tail", "")
                message = error.args[0].partition("\n--- server log ---")[0]
                answer({"error": type(error).__name__, "message": message, "log_tail": log_tail})
                return
            signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(1))  # ray.init has set its own
            answer({"servers": servers})
            for _question in sys.stdin:
                answer({"state": pool.state()})
        finally:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            pool.close()


if __name__ == "__main__":
    main()
