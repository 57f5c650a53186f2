"""A pool executor over servers that run already, with the policies of its features."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from genie.config import POOL_FEATURES
from genie.errors import ConfigError
from genie.runtime.link import ServerLink
from genie.runtime.peers import TIMEOUT_S
from genie.runtime.pool import PoolExecutor
from genie.scheduler.cluster import NOMINAL_LINK, CostModel, Link
from genie.scheduler.policies import BUILT_IN, load_policies
from genie.scheduler.problem import Policy


@dataclass(frozen=True)
class PoolCosts:
    """What was measured of a pool: a model of each device, the links to the client, and that between two
    servers (None: they cannot reach each other)."""

    devices: tuple[CostModel, ...]
    clients: tuple[Link, ...]
    peer: Link | None


def open_pool(
    links: Sequence[ServerLink],
    *,
    features: Collection[str] = POOL_FEATURES,
    policies: Sequence[Policy] | None = None,
    costs: PoolCosts | None = None,
    peer_timeout_s: float = TIMEOUT_S,
) -> PoolExecutor:
    """Takes over ``links``. ``features``: those of `genie.config.POOL_FEATURES` that are on. ``costs``: what
    the feature ``cost_model`` predicts with; without them the scheduler knows nominal rates only.
    ``policies``: instead of the built-in ones and those of installed packages. Raises ConfigError."""
    unknown = sorted(set(features) - set(POOL_FEATURES))
    if unknown:
        raise ConfigError(
            f"unknown feature {', '.join(unknown)} of a pool: choose from {', '.join(POOL_FEATURES)}"
        )
    if policies is None:
        policies = policies_of(features)
    if costs is None or "cost_model" not in features:
        return PoolExecutor(links, policies, peer=NOMINAL_LINK, peer_timeout_s=peer_timeout_s)
    return PoolExecutor(
        links,
        policies,
        costs=costs.devices,
        client_links=costs.clients,
        peer=costs.peer,
        peer_timeout_s=peer_timeout_s,
    )


def policies_of(features: Collection[str]) -> list[Policy]:
    """The built-in policies of these features, co-location always, and those of installed packages."""
    on = {"colocation", *features}
    return [*(policy() for feature, policy in BUILT_IN.items() if feature in on), *load_policies()]
