"""Chooses where a window runs: the least predicted time among what the policies propose."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from genie.errors import PlanError
from genie.scheduler.joining import join_of_state
from genie.scheduler.placing import megabytes
from genie.scheduler.plan import Declined, Placement, Plan, Transfer
from genie.scheduler.problem import Policy, Problem
from genie.scheduler.simulate import predict
from genie.scheduler.transfers import transfers
from genie.scheduler.validate import shortage, unreachable, validate

#: a plan over several servers must be predicted to save this part of the time of the best plan on one:
#: predictions err by more than less would be worth
MIN_GAIN = 0.05


@dataclass(frozen=True)
class _Candidate:
    placement: Placement
    transfers: tuple[Transfer, ...]
    predicted_s: float
    busy_s: tuple[float, ...]
    join_s: float

    @property
    def seconds(self) -> float:
        """What it costs in all: the window, and what it leaves to be joined."""
        return self.predicted_s + self.join_s

    @property
    def servers(self) -> int:
        return len({s for servers in self.placement.servers for s in servers})


def schedule(problem: Problem, policies: Sequence[Policy]) -> Plan:
    """Asks each policy, and takes the proposal with the least predicted time; the first of equals. One over
    several servers must beat the best on one server by `MIN_GAIN`. To a split's time counts what the next
    window needs to join the state that it leaves in shards.

    Pure. Raises PlanError when a policy raises, or proposes what would compute something else, and when no
    policy has a proposal for which the servers' memory and the links between them suffice.
    """
    candidates: list[_Candidate] = []
    considered: list[Declined] = []
    for policy in policies:
        for proposal in _ask(policy, problem):
            if isinstance(proposal, Declined):
                considered.append(proposal)
                continue
            outcome = _evaluate(problem, proposal)
            if isinstance(outcome, Declined):
                considered.append(outcome)
            else:
                candidates.append(outcome)
    if not candidates:
        reasons = "; ".join(f"{d.policy}{f' ({d.label})' if d.label else ''}: {d.why}" for d in considered)
        raise PlanError(
            f"no policy can place this window: {reasons or 'no policy was asked'}. Give the pool more memory "
            "or more servers, or a policy that fits"
        )
    timed = not problem.cluster.nominal
    best = min(candidates, key=lambda c: c.seconds)
    single = min((c for c in candidates if c.servers == 1), key=lambda c: c.seconds, default=None)
    chosen = best
    if timed and single is not None and best.servers > 1 and best.seconds > (1 - MIN_GAIN) * single.seconds:
        chosen = single
    for c in candidates:
        if c is not chosen:
            considered.append(
                Declined(
                    c.placement.policy, _why_not(c, chosen, single, timed), c.placement.label,
                    c.predicted_s if timed else None,
                )
            )  # fmt: skip
    return Plan(
        chosen.placement, chosen.transfers, chosen.predicted_s if timed else None, chosen.busy_s,
        tuple(considered), join_s=chosen.join_s,
    )  # fmt: skip


def _ask(policy: Policy, problem: Problem) -> Sequence[Placement | Declined]:
    name = getattr(policy, "name", type(policy).__name__)
    try:
        proposals = list(policy.propose(problem))
    except Exception as error:
        raise PlanError(
            f"policy {name} raised {type(error).__name__}: {error}. Correct it, or leave it out"
        ) from error
    for proposal in proposals:
        if not isinstance(proposal, Placement | Declined):
            raise PlanError(f"policy {name} proposed {proposal!r}: return Placement and Declined only")
    return proposals


def _evaluate(problem: Problem, placement: Placement) -> _Candidate | Declined:
    validate(problem, placement)
    moved = transfers(problem, placement)
    lack = unreachable(problem, moved) or shortage(problem, placement, moved)
    if lack is not None:
        return Declined(placement.policy, lack, placement.label)
    seconds, busy = predict(problem, placement, moved)
    join = join_of_state(problem, placement)
    if join.nbytes:
        cost = "" if problem.cluster.nominal else f", {join.seconds * 1e3:.2f} ms"
        why = f"{placement.why}; its state is joined for the next window ({megabytes(join.nbytes)}{cost})"
        placement = replace(placement, why=why)
    return _Candidate(placement, moved, seconds, busy, join.seconds)


def _why_not(c: _Candidate, chosen: _Candidate, single: _Candidate | None, timed: bool) -> str:
    if not timed:
        return f"{chosen.placement.policy} balances the nominal work no worse (no cost model is used)"
    joined = f" ({c.join_s * 1e3:.2f} ms of it to join its state)" if c.join_s else ""
    figures = f"{c.seconds * 1e3:.2f} ms{joined} against {chosen.seconds * 1e3:.2f} ms"
    if chosen is single and c.servers > 1 and c.seconds < chosen.seconds:
        return f"{figures} on one server: saves less than {MIN_GAIN:.0%}"
    where = " on one server" if chosen is single else f" of {chosen.placement.policy}"
    return f"{figures}{where}: takes longer" if c.seconds > chosen.seconds else f"{figures}{where}: no faster"
