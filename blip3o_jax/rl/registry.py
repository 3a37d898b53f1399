"""Map the names of `rl.policy` to policies; a new algorithm is a `Policy` and a row here."""

from blip3o_jax.config import Config, check_choice
from blip3o_jax.rl.flow_policy import FlowPolicy
from blip3o_jax.rl.protocol import Policy
from blip3o_jax.rl.token_policy import TokenPolicy

POLICIES: dict[str, tuple[type[Policy], ...]] = {
    "ar": (TokenPolicy,),
    "flow": (FlowPolicy,),
    "both": (TokenPolicy, FlowPolicy),
}


def make_policies(config: Config) -> tuple[Policy, ...]:
    """Return the policies that a run trains. ConfigError for an unknown name, and for settings that
    leave a policy nothing to learn from.
    """
    check_policy(config.rl.policy)
    return tuple(policy(config) for policy in POLICIES[config.rl.policy])


def check_policy(name: str) -> None:
    """Raise ConfigError unless `name` is a policy's."""
    check_choice("rl.policy", name, POLICIES)


def has_reference(policies: tuple[Policy, ...]) -> bool:
    """Return whether a run keeps the reference policy."""
    return any(policy.has_reference for policy in policies)
