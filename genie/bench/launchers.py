"""Who starts the servers of a run: options, and the pool that they ask for.

Imports nothing heavy: the options are read by every pytest run in the environment.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from genie.errors import GenieError
from genie.launch.bind import Bind

if TYPE_CHECKING:
    from genie.bench.pool import ServerPool
    from genie.bench.session import BenchSession

LAUNCHERS = ("local", "ray", "torchrun")
PLACEMENTS = ("SPREAD", "PACK", "STRICT_SPREAD", "STRICT_PACK")


@dataclass(frozen=True)
class Launch:
    """``ray_address`` and ``placement`` are Ray's; ``bind`` is for servers beyond this host."""

    launcher: str = LAUNCHERS[0]
    ray_address: str = "auto"
    placement: str = PLACEMENTS[0]
    bind: Bind = field(default_factory=Bind)


def add_launch_options(group: pytest.OptionGroup) -> None:
    group.addoption(
        "--genie-launcher",
        metavar="|".join(LAUNCHERS),
        default=LAUNCHERS[0],
        help="who starts the servers: this process, a Ray cluster that runs already, or torchrun",
    )
    group.addoption(
        "--genie-ray-address",
        metavar="HOST:PORT",
        help="of the Ray cluster's head (default: RAY_ADDRESS, or the cluster of this host)",
    )
    group.addoption(
        "--genie-ray-placement",
        metavar="|".join(PLACEMENTS),
        help="servers on as many of Ray's nodes as there are, or on as few (default: SPREAD)",
    )
    group.addoption("--genie-tls-cert", metavar="PEM", help="of servers beyond this host; a path on theirs")
    group.addoption("--genie-tls-key", metavar="PEM", help="the key of --genie-tls-cert; a path on theirs")
    group.addoption(
        "--genie-tls-ca", metavar="PEM", help="whom to trust for the servers (default: --genie-tls-cert)"
    )
    group.addoption(
        "--genie-insecure",
        action="store_true",
        help="let servers listen beyond loopback without TLS, on a network that you trust",
    )
    group.addoption(
        "--genie-pool-wait",
        metavar="SECONDS",
        default="60",
        help="how long to wait for the file of --genie-address FILE.json (default: 60)",
    )


def read_launch(config: pytest.Config, *, addresses_given: bool) -> Launch:
    """Raises ``pytest.UsageError`` that names the remedy."""
    get = config.getoption
    launcher = get("genie_launcher")
    if launcher not in LAUNCHERS:
        raise pytest.UsageError(
            f"--genie-launcher: unknown value {launcher!r}; choose one of {', '.join(LAUNCHERS)}"
        )
    if addresses_given and launcher != "local":
        raise pytest.UsageError(
            f"--genie-launcher {launcher} starts servers and --genie-address uses running ones: give one of "
            "the two"
        )
    placement = get("genie_ray_placement") or PLACEMENTS[0]
    if placement not in PLACEMENTS:
        raise pytest.UsageError(
            f"--genie-ray-placement: unknown value {placement!r}; choose one of {', '.join(PLACEMENTS)}"
        )
    for_ray = ("ray_address", "ray_placement", "tls_cert", "tls_key", "insecure")
    unused = [f"--genie-{name.replace('_', '-')}" for name in for_ray if get(f"genie_{name}")]
    if unused and launcher != "ray":
        raise pytest.UsageError(f"{', '.join(unused)}: only with --genie-launcher ray")
    bind = Bind(get("genie_tls_cert"), get("genie_tls_key"), get("genie_tls_ca"), get("genie_insecure"))
    if (bind.tls_cert is None) != (bind.tls_key is None):
        raise pytest.UsageError("--genie-tls-cert and --genie-tls-key go together: give both")
    if bind.tls_ca is not None and bind.tls_cert is None and not addresses_given:
        raise pytest.UsageError(
            "--genie-tls-ca: servers have no TLS without --genie-tls-cert (or give their --genie-address)"
        )
    return Launch(launcher, get("genie_ray_address") or "auto", placement, bind)


def is_pool_option(value: str) -> bool:
    """Whether --genie-address names a pool file: ``pool.json``, or ``@pool``.

    Raises ``pytest.UsageError`` for what pytest makes of ``--genie-address @pool.json``: it puts the lines of
    the file there, as it does for every argument that starts with @.
    """
    if value == "{":
        raise pytest.UsageError(
            "--genie-address @FILE: pytest itself replaces an argument that starts with @ by the lines of "
            "the file; write --genie-address FILE.json, or --genie-address=@FILE"
        )
    return value.startswith("@") or value.endswith(".json")


def read_pool_option(value: str, wait: str) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Addresses and pids of the pool file. Raises ``pytest.UsageError`` when it does not come in time."""
    from genie.launch.pool_file import PREFIX, read_pool

    try:
        seconds = float(wait)
    except ValueError:
        raise pytest.UsageError(f"--genie-pool-wait: {wait!r} is no number of seconds") from None
    try:
        pool = read_pool(Path(value.removeprefix(PREFIX)), seconds)
    except GenieError as error:
        raise pytest.UsageError(f"--genie-address {value}: {error}") from None
    return pool.addresses, pool.pids


def start_elsewhere(session: BenchSession, log_dir: Path) -> ServerPool:
    """The pool of --genie-launcher ray or torchrun. Raises ConfigError, ConnectError, AuthError."""
    launch = session.options.launch
    if launch.launcher == "ray":
        from genie.launch.ray_servers import RayServers

        return RayServers(
            session.server_count,
            session.device_type,
            log_dir,
            address=launch.ray_address,
            strategy=launch.placement,
            bind=launch.bind,
        )
    from genie.launch.torchrun_servers import TorchrunServers

    return TorchrunServers(session.server_count, session.device_type, log_dir)
