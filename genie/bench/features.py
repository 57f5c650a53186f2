"""Features proven by receipts: what ``genie_full`` says it runs with must show in what the servers counted.

    baseline, features                                 each program        programs of a cell
    genie_local_remote                                 resident            one server
    genie_no_semantics                                 stateless           over the pool
    genie_full, residency and colocation               resident            one server a request
    genie_full without residency                       stateless           one server a request
    genie_full without colocation, pool of 2 or more   stateless           over the pool

With residency on a pool of several, each window of a request follows a plan. Its policy belongs to a feature
that must be on (`POLICY_FEATURES`), it was predicted if and only if ``cost_model`` is on, and the servers
that it names are those that report executed ops.

A server counts a program as ``stateless`` when it kept none of its results, and as ``replayed`` when it
was lowered from a compiled graph: with the feature ``replay`` each request of `REPLAYED_FROM` ops or
more has such programs, without it none has. (Less than that is not worth compiling.)

It counts as ``ahead`` the programs that it had run when they were asked for, and as ``ahead_missed`` those
before which it had run others in vain: never without ``run_ahead``, and with it in every greedy decoding of
`FORESEEN_FROM` tokens or more on one server. It counts as ``engine_graph``, ``engine_compiled`` and
``rewritten`` what its engines did: never without ``compiled``, and with it, on a GPU, in every such decoding.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

from genie.config import NEEDS
from genie.errors import ConfigError, ReceiptError

if TYPE_CHECKING:
    from genie.baselines.protocol import Reply

#: features that may put the programs of one request on several servers although state stays in place
SPLITTING = frozenset({"phases", "pipelining", "branches"})
#: features of the scheduler, as far as the runtime that is measured has them: it may be of another revision
SCHEDULED = frozenset(
    feature
    for feature, needed in NEEDS.items()
    if needed == "residency" and feature not in ("compiled", "run_ahead")
)
#: features by the built-in policy that each switches on
POLICY_FEATURES = {
    "colocation": "colocation",
    "prefill": "phases",
    "pipelining": "pipelining",
    "branches": "branches",
}
#: ops of a request from which on it must have replayed something where replay is on
REPLAYED_FROM = 64
#: tokens of a decoding from which on its steps must have been foreseen, and found worth an engine
FORESEEN_FROM = 16
#: what a server counts only with a feature, by feature
COUNTED = {
    "run_ahead": ("ahead", "ahead_missed"),
    "compiled": ("engine_graph", "engine_compiled", "rewritten"),
}


def require_ablatable(ablated: Collection[str], servers: int) -> None:
    """Raises ConfigError for an ablation that this pool cannot show."""
    shown = sorted({"colocation", *SCHEDULED} & set(ablated)) if servers == 1 else []
    if shown:
        raise ConfigError(
            f"--genie-ablate {','.join(shown)} changes nothing on a pool of one server, so nothing can be "
            "measured: give --genie-servers 2 (or two addresses), or leave the option out"
        )


def is_stateless(baseline: str, features: Collection[str], servers: int) -> bool:
    """Whether a Genie baseline may leave no result on a pool of ``servers``, so that all state travels."""
    if baseline == "genie_full":
        return "residency" not in features or not ("colocation" in features or servers == 1)
    return baseline == "genie_no_semantics"


def check_features(
    replies: Sequence[Reply],
    *,
    baseline: str,
    features: Collection[str],
    servers: int,
    where: str,
    greedy: bool = False,
) -> None:
    """Raises ReceiptError when the receipts of a Genie cell contradict the features it claims.
    ``greedy``: the requests are greedy decodings."""
    if baseline == "genie_no_semantics":
        features = frozenset()
    elif baseline != "genie_full":
        features = frozenset({"residency", "colocation"})
    colocated = "colocation" in features or servers == 1
    stateless = is_stateless(baseline, features, servers)
    claim = f"with features {', '.join(sorted(features)) or 'none'}"
    for reply in replies:
        for receipt in reply.receipts:
            counted = receipt.counters.get("stateless", 0)
            if not stateless and counted:
                raise ReceiptError(
                    f"{where}: {claim} results stay on the server, but pid {receipt.pid} counts {counted} "
                    "stateless programs: residency was not really on"
                )
            if stateless and counted < (receipt.programs or 0):
                raise ReceiptError(
                    f"{where}: {claim} no result stays on a server, but pid {receipt.pid} counts {counted} "
                    f"of {receipt.programs} programs as stateless: residency was not really off"
                )
        _check_replay(reply, "replay" in features, where, claim)
        _check_counted(reply, features, where, claim, greedy)
        _check_plans(reply, features, where, claim)
        pids = {receipt.pid for receipt in reply.receipts if receipt.ops}
        if colocated and len(pids) > 1 and not SPLITTING & set(features):
            raise ReceiptError(
                f"{where}: {claim} a request runs on one server, but pids {', '.join(map(str, pids))} "
                "worked on it: colocation was not really on"
            )
    receipts = [receipt for reply in replies for receipt in reply.receipts if receipt.ops]
    programs = sum(receipt.programs or 0 for receipt in receipts)
    if not colocated and programs > 1 and len({receipt.pid for receipt in receipts}) == 1:
        raise ReceiptError(
            f"{where}: {claim} programs go to the {servers} servers in turn, but all {programs} ran in pid "
            f"{receipts[0].pid}: colocation was not really off"
        )


def _check_plans(reply: Reply, features: Collection[str], where: str, claim: str) -> None:
    for plan in reply.plans:
        feature = POLICY_FEATURES.get(plan.policy)
        if feature is not None and feature not in features:
            raise ReceiptError(
                f"{where}: {claim} a window followed a plan of {plan.policy}: {feature} was not really off"
            )
        if (plan.predicted_ms is not None) != ("cost_model" in features):
            off = "off" if plan.predicted_ms is not None else "on"
            raise ReceiptError(
                f"{where}: {claim} a plan of {plan.policy} was predicted to take {plan.predicted_ms} ms: "
                f"cost_model was not really {off}"
            )
    planned = {pid for plan in reply.plans for pid in plan.pids}
    worked = {receipt.pid for receipt in reply.receipts if receipt.ops}
    if planned and planned != worked:
        raise ReceiptError(
            f"{where}: {claim} the plans name the servers with pids {sorted(planned)}, but ops were executed "
            f"by {sorted(worked)}: the plans were not followed"
        )


def _check_counted(reply: Reply, features: Collection[str], where: str, claim: str, greedy: bool) -> None:
    worked = [receipt for receipt in reply.receipts if receipt.ops]
    steady = greedy and len(worked) == 1 and len(reply.response.token_s) >= FORESEEN_FROM
    for feature, counters in COUNTED.items():
        counted = {name: r.counters[name] for r in reply.receipts for name in counters if name in r.counters}
        if counted and feature not in features:
            raise ReceiptError(
                f"{where}: {claim} no server counts {' or '.join(counters)}, but they count {counted}: "
                f"{feature} was not really off"
            )
        must = steady and (feature == "run_ahead" or worked[0].device.startswith("cuda"))
        if feature in features and must and not set(counted) - {"ahead_missed"}:
            raise ReceiptError(
                f"{where}: {claim} {len(reply.response.token_s)} tokens were decoded, but no server counts "
                f"{' or '.join(c for c in counters if c != 'ahead_missed')}: {feature} was not really on. "
                f"Its log may say why; measure it with --genie-ablate {feature}"
            )


def _check_replay(reply: Reply, on: bool, where: str, claim: str) -> None:
    replayed = sum(receipt.counters.get("replayed", 0) for receipt in reply.receipts)
    ops = sum(receipt.ops or 0 for receipt in reply.receipts)
    if replayed and not on:
        raise ReceiptError(
            f"{where}: {claim} nothing is replayed, but the servers count {replayed} replayed programs: "
            "replay was not really off"
        )
    if on and not replayed and ops >= REPLAYED_FROM:
        raise ReceiptError(
            f"{where}: {claim} the request's {ops} ops were all captured anew: replay was not really on. "
            "Either no timed request was like one before it, or the model cannot be compiled (the log of "
            "genie.replay says why): measure it with --genie-ablate replay"
        )
