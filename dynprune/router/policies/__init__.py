"""Policies over configurations, `router.policy` or a method's own."""

from collections.abc import Mapping
from typing import Any

from dynprune.router.policies.base import Policy
from dynprune.router.policies.conditional_bernoulli import ConditionalBernoulliPolicy
from dynprune.router.policies.gumbel import GumbelPolicy
from dynprune.router.policies.plackett_luce import PlackettLucePolicy
from dynprune.router.policies.sinkhorn import SinkhornPolicy
from dynprune.router.policies.value import ValuePolicy

__all__ = [
    "POLICIES",
    "ConditionalBernoulliPolicy",
    "GumbelPolicy",
    "PlackettLucePolicy",
    "Policy",
    "SinkhornPolicy",
    "ValuePolicy",
    "build_policy",
]


POLICIES: dict[str, type[Policy]] = {
    policy.name: policy
    for policy in (ConditionalBernoulliPolicy, GumbelPolicy, PlackettLucePolicy, SinkhornPolicy, ValuePolicy)
}
"""The policies by name; a plugin may add its own."""


def build_policy(config: Mapping[str, Any]) -> Policy:
    """Builds the policy that `Policy.config` described.

    Args:
        config: ``name`` and the constructor's arguments.

    Raises:
        ValueError: If there is no policy of that name, or an argument is wrong.
    """
    if config["name"] not in POLICIES:
        raise ValueError(f"router.policy={config['name']!r} is unknown; allowed: {', '.join(POLICIES)}")
    return POLICIES[config["name"]](**{key: value for key, value in config.items() if key != "name"})
