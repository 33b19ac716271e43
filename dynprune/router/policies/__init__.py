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
    "ConditionalBernoulliPolicy",
    "GumbelPolicy",
    "PlackettLucePolicy",
    "Policy",
    "SinkhornPolicy",
    "ValuePolicy",
    "build_policy",
]


def build_policy(config: Mapping[str, Any]) -> Policy:
    """Builds the policy that `Policy.config` described.

    Args:
        config: ``name`` and the constructor's arguments.

    Raises:
        ValueError: If there is no policy of that name, or an argument is wrong.
    """
    classes = (ConditionalBernoulliPolicy, GumbelPolicy, PlackettLucePolicy, SinkhornPolicy, ValuePolicy)
    by_name: dict[str, type[Policy]] = {policy.name: policy for policy in classes}
    if config["name"] not in by_name:
        raise ValueError(f"router.policy={config['name']!r} is unknown; allowed: {', '.join(by_name)}")
    return by_name[config["name"]](**{key: value for key, value in config.items() if key != "name"})
