"""Environments speak messages: the `AgentEnv` contract, tools, registry, and the pool that hosts them."""
