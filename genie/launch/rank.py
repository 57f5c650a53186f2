"""Which member of a pool this process is: what torchrun or srun has put into its environment."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass

from genie.errors import ConfigError

_SCONTROL_SECONDS = 10.0
#: of MASTER_PORT under SLURM where the user gives none: one per job, outside the kernel's ephemeral ports
_SLURM_PORTS = range(20000, 30000)


@dataclass(frozen=True)
class Rank:
    """``rank`` of ``size`` members, ``local_rank`` among those of this host.

    ``master``: host and port where the members meet. ``store_runs``: the engine serves a
    ``torch.distributed`` store there already; otherwise rank 0 does. ``attempt`` counts restarts.
    ``own_cores``, ``own_gpu``: the engine lets this process see only its own. ``one_host``: all members
    are on this host. ``engine``: "torchrun" or "slurm".
    """

    engine: str
    rank: int
    local_rank: int
    size: int
    master: tuple[str, int]
    store_runs: bool = False
    attempt: int = 0
    own_cores: bool = False
    own_gpu: bool = False
    one_host: bool = False


def read_rank(environ: Mapping[str, str]) -> Rank:
    """From RANK and its companions (torchrun), else from SLURM_PROCID and its own (srun).

    Raises ConfigError that names the variable that is missing or wrong.
    """
    if "RANK" in environ and "WORLD_SIZE" in environ:
        return _torchrun(environ)
    if "SLURM_PROCID" in environ:
        return _slurm(environ)
    raise ConfigError(
        "--pool: neither torchrun nor srun has started this process (no RANK and WORLD_SIZE, no SLURM_PROCID "
        "in the environment): run `torchrun --nproc-per-node N -m genie serve --pool FILE`, or `srun -n N "
        "python -m genie serve --pool FILE`; a single server needs no --pool"
    )


def _torchrun(environ: Mapping[str, str]) -> Rank:
    size = _number(environ, "WORLD_SIZE")
    return Rank(
        engine="torchrun",
        rank=_number(environ, "RANK", below=size),
        local_rank=_number(environ, "LOCAL_RANK"),
        size=size,
        master=(_text(environ, "MASTER_ADDR"), _number(environ, "MASTER_PORT", below=65536)),
        store_runs=environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
        attempt=_number(environ, "TORCHELASTIC_RESTART_COUNT", default=0),
        one_host=_number(environ, "LOCAL_WORLD_SIZE", default=0) == size,
    )


def _slurm(environ: Mapping[str, str]) -> Rank:
    size = _number(environ, "SLURM_NTASKS")
    host = environ.get("MASTER_ADDR")
    if not host:
        names = environ.get("SLURM_STEP_NODELIST") or _text(environ, "SLURM_JOB_NODELIST")
        host = first_host(names)
    port = _SLURM_PORTS[_number(environ, "SLURM_JOB_ID", default=0) % len(_SLURM_PORTS)]
    return Rank(
        engine="slurm",
        rank=_number(environ, "SLURM_PROCID", below=size),
        local_rank=_number(environ, "SLURM_LOCALID"),
        size=size,
        master=(host, _number(environ, "MASTER_PORT", below=65536, default=port)),
        attempt=_number(environ, "SLURM_RESTART_COUNT", default=0),
        # "none" where srun binds nobody: then the tasks of a host share its cores, and we divide them.
        own_cores=environ.get("SLURM_CPU_BIND_TYPE", "none").rstrip(":") not in ("none", ""),
        own_gpu="SLURM_GPUS_PER_TASK" in environ,
        one_host=_number(environ, "SLURM_STEP_NUM_NODES", default=0) == 1,
    )


def first_host(names: str) -> str:
    """The first of a SLURM node list ("gpu[07-09,12],login1" gives "gpu07"), as scontrol expands it.

    Without scontrol (a container): the first number of the first bracket, which is the same for lists with
    one bracket per name. Raises ConfigError where neither can tell.
    """
    if scontrol := shutil.which("scontrol"):
        done = subprocess.run(
            [scontrol, "show", "hostnames", names],
            capture_output=True, text=True, timeout=_SCONTROL_SECONDS, check=False,
        )  # fmt: skip
        if done.returncode == 0 and done.stdout.strip():
            return done.stdout.split()[0]
    match = re.match(r"([^\[\],]+)(?:\[(\d+)[^\[\]]*\](?![\[\w]))?(?:,|$)", names)
    if match is None:
        raise ConfigError(
            f"cannot tell the first host of the SLURM node list {names!r}: set MASTER_ADDR to the host of "
            "task 0, for all tasks"
        )
    return match[1] + (match[2] or "")


def _text(environ: Mapping[str, str], name: str) -> str:
    value = environ.get(name)
    if not value:
        raise ConfigError(f"--pool: the environment lacks {name}: torchrun and srun set it, so must you")
    return value


def _number(
    environ: Mapping[str, str], name: str, *, below: int | None = None, default: int | None = None
) -> int:
    if default is not None and name not in environ:
        return default
    value = _text(environ, name)
    if not value.isdecimal() or (below is not None and int(value) >= below):
        limit = "" if below is None else f" below {below}"
        raise ConfigError(f"--pool: {name}={value} is not a whole number{limit}: set it as torchrun does")
    return int(value)
