"""The plugin's command line: every ``--genie-*`` option, checked before anything is collected.

Imports nothing heavy: this module is loaded by every pytest run in the environment.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from genie.bench.launchers import Launch, add_launch_options, is_pool_option, read_launch, read_pool_option
from genie.config import FEATURES, IMPLEMENTED_FEATURES, NEEDS
from genie.errors import ConfigError

#: ids in options and results; the order is the order of rows
BASELINES = (
    "local_pytorch",
    "genie_capture_only",
    "genie_local_remote",
    "genie_no_semantics",
    "genie_full",
    "pytorch_rpc",
    "ray",
)
#: rows beside the seven, for comparison: they run where they are asked for by name, and in these profiles
REFERENCES = {"local_compiled": ("gpu",)}
#: built-in rows in the order of every table: a reference stands below what it is an alternative to
ROWS = (BASELINES[0], *REFERENCES, *BASELINES[1:])
PROFILES = ("smoke", "cpu", "gpu")
DEVICES = ("auto", "cpu", "cuda")
TOKEN_VARIABLE = "GENIE_TOKEN"
ABLATE_EACH = "all"
BASELINES_HELP = (
    f"run only these of: {', '.join(ROWS)}, and of what pytest_genie_baselines adds (default: all; "
    f"{', '.join(REFERENCES)} only in the gpu profile)"
)


@dataclass(frozen=True)
class Options:
    """What the user asked for; None means "decide from the machine when the first cell needs it"."""

    servers: int | None
    addresses: tuple[str, ...]
    token: str
    device: str
    profile: str | None
    weights: str
    baselines: tuple[str, ...]
    rounds: Mapping[str, int]
    ablate: frozenset[str]
    #: one more row for each feature, in which it alone is switched off
    ablate_each: bool = False
    #: measure at the end what the cells' devices reach at most
    ceiling: bool = True
    #: folder for one trace per Genie cell, of a request that is not timed
    trace: Path | None = None
    #: asked for by name, of those that pytest_genie_baselines adds; None: all of them
    own_baselines: tuple[str, ...] | None = None
    #: reference rows asked for by name; None: those of the profile
    references: tuple[str, ...] | None = None
    #: who starts the servers, where no addresses are given
    launch: Launch = field(default_factory=Launch)
    #: of the servers at ``addresses``, where a pool file tells them
    pids: tuple[int, ...] = ()

    @property
    def features(self) -> frozenset[str]:
        """Features that ``genie_full`` runs with."""
        return features_without(self.ablate)

    def rows(self, profile: str) -> tuple[str, ...]:
        """The built-in baselines and references to run at ``profile``, in the order of the tables."""
        if self.references is None:
            references = tuple(name for name, profiles in REFERENCES.items() if profile in profiles)
        else:
            references = self.references
        return tuple(name for name in ROWS if name in self.baselines or name in references)


def features_without(ablated: Collection[str]) -> frozenset[str]:
    """All implemented features but those in ``ablated`` and those that need one of them."""

    def works(feature: str | None) -> bool:
        return feature is None or (feature not in ablated and works(NEEDS.get(feature)))

    return frozenset(filter(works, IMPLEMENTED_FEATURES))


def add_options(parser: pytest.Parser) -> None:
    group = parser.getgroup("genie", "Genie: cost of a disaggregated accelerator")
    group.addoption(
        "--genie-servers",
        metavar="N",
        help="servers to start, one device each (default: every GPU; without GPUs 2, or 1 on one core)",
    )
    group.addoption(
        "--genie-address",
        metavar="HOST:PORT,...|FILE.json",
        help="use servers that already run, instead of starting any (FILE.json: those that `genie serve "
        f"--pool` has written there); token in ${TOKEN_VARIABLE}",
    )
    add_launch_options(group)
    group.addoption("--genie-device", metavar="|".join(DEVICES), default="auto", help="default: auto")
    group.addoption(
        "--genie-profile",
        metavar="|".join(PROFILES),
        help="sizes of the workloads (default: gpu with CUDA, else cpu)",
    )
    group.addoption(
        "--genie-weights",
        metavar="seeded|pretrained|DIR",
        default="seeded",
        help="seeded initialisation (default), the hub's checkpoints, or a directory of checkpoints",
    )
    group.addoption("--genie-baselines", metavar="A,B,...", help=BASELINES_HELP)
    group.addoption(
        "--genie-rounds",
        metavar="N[,WORKLOAD=M,...]",
        help="timed rounds per cell, and of these workloads' cells (default: by profile)",
    )
    group.addoption(
        "--genie-ablate",
        metavar="FEATURE,...|all",
        help=f"switch features of genie_full off, of: {', '.join(IMPLEMENTED_FEATURES)}; "
        "all: one more row for each, without it",
    )
    group.addoption(
        "--genie-no-ceiling",
        action="store_true",
        help="do not measure at the end what one device and several reach at most here (seconds)",
    )
    group.addoption(
        "--genie-trace",
        metavar="DIR",
        help="write there a trace of one more request of each Genie cell, after its timed rounds",
    )


def read_options(
    config: pytest.Config, environ: Mapping[str, str] = os.environ, *, own: Collection[str] | None = ()
) -> Options:
    """Options as given; raises ``pytest.UsageError`` that names the remedy for every bad value.

    ``own``: the baselines that the user has added; None while they are not all known, which leaves
    unknown names to ``require_baselines``.
    """
    ablate = config.getoption("genie_ablate")
    device = _one_of("--genie-device", config.getoption("genie_device"), DEVICES)
    profile = config.getoption("genie_profile")
    addresses, pids = _addresses(config.getoption("genie_address"), config.getoption("genie_pool_wait"))
    servers = _positive("--genie-servers", config.getoption("genie_servers"))
    token = environ.get(TOKEN_VARIABLE, "")
    if addresses and not token:
        raise pytest.UsageError(
            f"--genie-address needs the servers' token: set {TOKEN_VARIABLE} to what they were started with"
        )
    if addresses and servers is not None:
        raise pytest.UsageError(
            "--genie-servers starts servers and --genie-address uses running ones: give one of the two"
        )
    if device == "cuda":
        # Ray's servers have the GPUs of other hosts; this one has the local baselines'.
        _require_gpus(servers if config.getoption("genie_launcher") != "ray" else 1)
    baselines, references, own_baselines = _baselines(config.getoption("genie_baselines"))
    if own is not None:
        require_baselines(own_baselines or (), own)
    return Options(
        servers=servers,
        addresses=addresses,
        token=token,
        device=device,
        profile=None if profile is None else _one_of("--genie-profile", profile, PROFILES),
        weights=_weights(config.getoption("genie_weights")),
        baselines=baselines,
        own_baselines=own_baselines,
        references=references,
        rounds=read_rounds(config.getoption("genie_rounds")),
        ablate=frozenset() if ablate == ABLATE_EACH else _ablated(ablate),
        ablate_each=ablate == ABLATE_EACH,
        ceiling=not config.getoption("genie_no_ceiling"),
        trace=_trace(config.getoption("genie_trace")),
        launch=read_launch(config, addresses_given=bool(addresses)),
        pids=pids,
    )


def _one_of(option: str, value: str, choices: tuple[str, ...]) -> str:
    if value not in choices:
        raise pytest.UsageError(f"{option}: unknown value {value!r}; choose one of {', '.join(choices)}")
    return value


def _positive(option: str, value: str | None) -> int | None:
    if value is None:
        return None
    if not value.isascii() or not value.isdigit() or int(value) < 1:
        raise pytest.UsageError(f"{option}: {value!r} is not a whole number of 1 or more")
    return int(value)


def read_rounds(value: str | None) -> Mapping[str, int]:
    """By workload; "" is for all others. Raises ``pytest.UsageError``."""
    found: dict[str, int] = {}
    for part in _listed(value or ""):
        workload, _, count = part.rpartition("=")
        found[workload.strip()] = _positive("--genie-rounds", count.strip()) or 0
    if value is not None and not found:
        raise pytest.UsageError("--genie-rounds: no number given; write N, or N,WORKLOAD=M")
    return found


def _listed(value: str) -> list[str]:
    return [name.strip() for name in value.split(",") if name.strip()]


def require_baselines(asked: Collection[str], own: Collection[str]) -> None:
    """Raises ``pytest.UsageError`` for a baseline that is neither built in nor among the user's ``own``."""
    unknown = [name for name in asked if name not in own]
    if unknown:
        raise pytest.UsageError(
            f"--genie-baselines: unknown baseline {', '.join(unknown)}; "
            f"choose from {', '.join([*ROWS, *own])}, or name yours in the hook pytest_genie_baselines"
        )


def _baselines(
    value: str | None,
) -> tuple[tuple[str, ...], tuple[str, ...] | None, tuple[str, ...] | None]:
    """The built-in ones in the table's order, the references, and the names of others; None where nothing
    was asked for: the references of the profile, and all others."""
    if value is None:
        return BASELINES, None, None
    names = _listed(value)
    if not names:
        raise pytest.UsageError(
            f"--genie-baselines: unknown baseline {value!r}; choose from {', '.join(ROWS)}"
        )
    others = tuple(dict.fromkeys(name for name in names if name not in ROWS))
    built_in = tuple(name for name in BASELINES if name in names)
    return built_in, tuple(name for name in REFERENCES if name in names), others


def _ablated(value: str | None) -> frozenset[str]:
    names = _listed(value or "")
    unknown = [name for name in names if name not in FEATURES]
    if unknown or (value is not None and not names):
        raise pytest.UsageError(
            f"--genie-ablate: unknown feature {', '.join(unknown) or repr(value)}; "
            f"choose from {', '.join(IMPLEMENTED_FEATURES)}, or {ABLATE_EACH} alone"
        )
    missing = [name for name in names if name not in IMPLEMENTED_FEATURES]
    if missing:
        raise pytest.UsageError(
            f"--genie-ablate: feature {', '.join(missing)} is not implemented yet, so it cannot be switched "
            f"off; choose from {', '.join(IMPLEMENTED_FEATURES)}"
        )
    return frozenset(names)


def _trace(value: str | None) -> Path | None:
    if value is None:
        return None
    folder = Path(value)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise pytest.UsageError(
            f"--genie-trace: {value} cannot be made ({error.strerror}): name a folder"
        ) from None
    return folder


def _weights(value: str) -> str:
    if value not in ("seeded", "pretrained") and not Path(value).is_dir():
        raise pytest.UsageError(
            f"--genie-weights: {value!r} is neither 'seeded', 'pretrained' nor a directory with checkpoints"
        )
    return value


def _addresses(value: str | None, pool_wait: str) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Addresses, and the servers' pids where they are known."""
    if value is None:
        return (), ()
    if is_pool_option(value):
        return read_pool_option(value, pool_wait)
    addresses = tuple(_listed(value))
    for address in addresses:
        host, _, port = address.rpartition(":")
        if not host or not port.isdigit() or not 0 < int(port) < 65536:
            raise pytest.UsageError(
                f"--genie-address: {address!r} is not HOST:PORT (for example 127.0.0.1:7070)"
            )
    if not addresses:
        raise pytest.UsageError("--genie-address: no address given; write HOST:PORT,HOST:PORT")
    return addresses, ()


def _require_gpus(servers: int | None) -> None:
    from genie.devices import device_slot, resolve_device_type

    try:
        resolve_device_type("cuda")
        device_slot("cuda", (servers or 1) - 1)
    except ConfigError as error:
        raise pytest.UsageError(f"--genie-device cuda: {error}") from None
