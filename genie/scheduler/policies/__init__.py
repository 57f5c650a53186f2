"""The policies that Genie comes with, by the feature that switches each on, and those of a user's own."""

from __future__ import annotations

from importlib.metadata import entry_points

from genie.errors import PlanError
from genie.scheduler.policies.branches import Branches
from genie.scheduler.policies.colocation import Colocation
from genie.scheduler.policies.pipelining import Pipelining
from genie.scheduler.policies.prefill import Prefill
from genie.scheduler.policies.round_robin import RoundRobin
from genie.scheduler.problem import Policy

#: feature -> its policy, in the order in which they are asked
BUILT_IN: dict[str, type[Policy]] = {
    "colocation": Colocation,
    "phases": Prefill,
    "pipelining": Pipelining,
    "branches": Branches,
}

ENTRY_POINTS = "genie.policies"

__all__ = ["BUILT_IN", "ENTRY_POINTS", "RoundRobin", "load_policies"]


def load_policies(group: str = ENTRY_POINTS) -> list[Policy]:
    """Policies of installed packages, by the names of their entry points: each names a class, or a function,
    that makes a policy when called without arguments. Raises PlanError for one that does not."""
    found: list[Policy] = []
    for point in sorted(entry_points(group=group), key=lambda p: p.name):
        try:
            policy = point.load()()
        except Exception as error:
            raise PlanError(
                f"entry point {point.name} = {point.value} of {group} gives no policy: "
                f"{type(error).__name__}: {error}. Correct or uninstall the package that declares it"
            ) from error
        if not isinstance(getattr(policy, "name", None), str) or not callable(
            getattr(policy, "propose", None)
        ):
            raise PlanError(
                f"entry point {point.name} = {point.value} of {group} made {policy!r}, which is no policy: "
                "it needs a name and a method propose(problem)"
            )
        found.append(policy)
    return found
