"""What the class of an environment declares, beside what every environment has."""

from envs.base import AgentEnv


def reserved_names() -> frozenset[str]:
    """Names of AgentEnv's own attributes. A tool of such a name would replace the attribute, or be replaced by it."""
    declared = {name for base in AgentEnv.__mro__ for name in vars(base).get("__annotations__", {})}
    return frozenset(declared.union(dir(AgentEnv)))


def declared_timeouts(env: AgentEnv | type[AgentEnv]) -> dict[str, float]:
    """Deadlines of reset, step and reward that are not AgentEnv's own, by the attribute's name, in seconds.

    Example: declared_timeouts(Haiku) -> {"reward_timeout_s": 20.0}
    """
    names = ("reset_timeout_s", "step_timeout_s", "reward_timeout_s")
    values = {name: getattr(env, name) for name in names}
    return {name: value for name, value in values.items() if value != getattr(AgentEnv, name)}
