"""Rollouts join messages and tokens: dialect, episodes, groups, leases, and the worker that runs them."""
