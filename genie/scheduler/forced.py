"""A policy that follows one proposal, by name: to measure what was not chosen."""

from __future__ import annotations

from collections.abc import Sequence

from genie.scheduler.plan import Declined, Placement
from genie.scheduler.policies.colocation import Colocation
from genie.scheduler.problem import Policy, Problem


class Forced:
    """Proposes what policy ``policy`` proposes under ``label``; co-location for windows where it does not.

    Co-location itself would go where the session's weights are; forced, it goes to the server of its label,
    wherever they were uploaded to.
    """

    name = "forced"

    def __init__(self, policies: Sequence[Policy], policy: str, label: str) -> None:
        self._policies = [p for p in policies if p.name == policy]
        self._policy, self._label = policy, label

    def propose(self, problem: Problem) -> Sequence[Placement | Declined]:
        policies = self._policies
        if self._policy == Colocation.name:
            policies = [Colocation(on=device.index) for device in problem.cluster.devices]
        for policy in policies:
            for proposal in policy.propose(problem):
                if isinstance(proposal, Placement) and proposal.label == self._label:
                    return [proposal]
        return Colocation().propose(problem)
