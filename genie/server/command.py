"""``genie serve``: options. Imports nothing heavy, so that the process is pinned before torch starts."""

from __future__ import annotations

import argparse
import os
import re
import time
from pathlib import Path

from genie.errors import ConfigError

HELP = "run a server on one device, in the foreground"

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--host", help="address to listen on (default: loopback only; with --pool: auto)")
    add(
        "--peer-host",
        default="",
        help="this host's address in the trusted network of the pool, for tensors that move between servers "
        "(default: the one to listen on)",
    )
    add("--port", type=int, default=0, help="port to listen on; 0 = chosen by the kernel, see the ready line")
    add("--device", default="auto", help="cpu, cpu:N, cuda, cuda:N or auto (default)")
    add("--cores", default="", help="core numbers to run on, as in 0,1 or 0-3 (default: all it may use)")
    add("--token-file", help="file that holds the shared token (default: the variable GENIE_TOKEN)")
    add("--tls-cert", help="certificate chain, PEM; needs --tls-key")
    add("--tls-key", help="private key, PEM")
    add("--insecure", action="store_true", help="listen beyond loopback without a token file and TLS")
    add("--memory-limit", default="0", metavar="BYTES[K|M|G]", help="what one session may hold; 0 = no limit")
    add(
        "--keep-weights",
        default="0",
        metavar="BYTES[K|M|G]",
        help="shared weights to keep for the next session when nobody uses them",
    )
    add(
        "--checkpoints",
        action="append",
        default=[],
        metavar="DIR",
        help="read weights from the *.safetensors files below this directory if they are what a client would "
        "upload; may be given several times",
    )
    add("--log-file", help="append the log here (default: stderr)")
    add("--die-with-parent", action="store_true", help="stop at the end of stdin, or when the parent dies")
    add(
        "--pool",
        metavar="FILE",
        help="under torchrun or srun: join the other ranks, and have rank 0 write their addresses there; "
        "--host auto is then this host's address on the way to rank 0",
    )
    add(
        "--pool-wait",
        type=float,
        default=300.0,
        metavar="SECONDS",
        help="how long to wait for the other ranks (default: 300)",
    )
    add("--ready-fd", type=int, default=1, help="descriptor that gets the one-line JSON ready message")


def run(args: argparse.Namespace) -> int:
    started = time.monotonic()
    if args.pool and args.cores:
        raise ConfigError(
            "--cores: with --pool each rank takes its share of the cores it may use; confine them all with "
            "taskset or srun --cpu-bind"
        )
    cores = parse_cores(args.cores)
    if cores:
        try:
            os.sched_setaffinity(0, cores)
        except OSError as exc:
            raise ConfigError(
                f"cannot run on the cores {args.cores}: {exc.strerror}; give others to --cores"
            ) from exc
    from genie.server.process import ServeOptions, serve

    options = vars(args) | {
        "host": args.host or ("auto" if args.pool else "127.0.0.1"),
        "cores": cores,
        "memory_limit": parse_size(args.memory_limit),
        "keep_weights": parse_size(args.keep_weights),
        "checkpoints": tuple(args.checkpoints),
    }
    serving = ServeOptions(**{k: options[k] for k in ServeOptions.__dataclass_fields__})
    if not args.pool:
        return serve(serving, started)
    from genie.launch.member import Member
    from genie.launch.rank import read_rank

    member = Member(read_rank(os.environ), Path(args.pool), args.pool_wait)
    return serve(member.placed(serving), started, member)


def parse_size(text: str) -> int:
    """ "512", "64K", "1.5G" to bytes. Raises ConfigError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([KMG]?)", text.strip().upper())
    if match is None:
        raise ConfigError(f"{text!r} is no size: write bytes, or a number with K, M or G")
    return int(float(match[1]) * _UNITS[match[2]])


def parse_cores(text: str) -> tuple[int, ...]:
    """ "0,2-3" to (0, 2, 3). Raises ConfigError."""
    cores: set[int] = set()
    for part in filter(None, text.split(",")):
        match = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part)
        if match is None or int(match[2] or match[1]) - int(match[1]) > 4096:
            raise ConfigError(f"--cores {text}: write core numbers, as in 0,1 or 0-3")
        cores.update(range(int(match[1]), int(match[2] or match[1]) + 1))
    return tuple(sorted(cores))
