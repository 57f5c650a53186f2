"""Which operations a server runs: the reviewed names of ``allowed_ops.txt``, nothing else."""

from __future__ import annotations

from pathlib import Path

from genie.errors import UnsupportedOpError

PSEUDO_OPS = frozenset({"genie::manual_seed", "genie::get_rng_state", "genie::set_rng_state"})
ALLOWED_BASES = frozenset(
    line
    for line in Path(__file__).with_name("allowed_ops.txt").read_text().splitlines()
    if line and not line.startswith("#")
)


def is_allowed(op: str) -> bool:
    """``op`` is "namespace::name.overload", or without the overload."""
    namespace, _, name = op.partition("::")
    return (namespace == "aten" and name.partition(".")[0] in ALLOWED_BASES) or op in PSEUDO_OPS


def check(op: str) -> None:
    """Raises UnsupportedOpError for an operation that servers do not run."""
    if not is_allowed(op):
        raise UnsupportedOpError(
            f"servers do not run {op}: compute it on the CPU (tensor.cpu()), or use an operation of "
            "genie/wire/allowed_ops.txt"
        )
